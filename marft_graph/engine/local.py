"""The local engine: transformers in process, all waiting calls of all nodes in one running batch.

A thread decodes. Calls join the running batch as they arrive, first come, first served, as long as
its cache has room; what prompts have in common is computed once; each row has its own adapter,
length, temperature and random stream. Knows the policy, but nothing of graphs or episodes.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor

from marft_graph.engine.base import ChatCodec, Completion, Gate, GenerationRequest
from marft_graph.engine.cache import RowCache, bytes_per_token
from marft_graph.engine.prefill import Prompt, prefill
from marft_graph.engine.prefixes import Prefixes
from marft_graph.engine.running import Running, Waiting
from marft_graph.engine.sampler import constrain, sample
from marft_graph.episode import FinishReason
from marft_graph.errors import (
    EngineError,
    MarftError,
    PromptTooLongError,
)
from marft_graph.names import agent_of_adapter
from marft_graph.policy.adapters import Policy
from marft_graph.policy.beginning import SharedBeginning
from marft_graph.policy.lora import AdapterValues

logger = logging.getLogger(__name__)

# A thread without work ends after this, so that an engine nobody closed can be collected.
_IDLE_SECONDS = 5.0
# How often a publication looks whether cancelled calls have left the batch.
_LEAVING_SECONDS = 0.002
# Padded prompt tokens in one prefill pass, and bytes of their keys and values; bound its memory.
_PREFILL_TOKENS = 16384
_PREFILL_BYTES = 2**28
_PREFILL_CUDA_BYTES = 2**30
# Calls that follow from answers wait so many steps for others, unless many may come already: more
# prompts go through the model together, and the app's own work runs beside the decoding.
_STEPS_TOGETHER = 8
_MANY = 1 / 8
"""As a share of the running rows."""
# Share of the cache's memory for what answered calls left.
_KEPT_SHARE = 0.25


class LocalEngine:
    """Samples from a `Policy` in a thread of its own; thread-safe.

    The engine shares the base with the learner; its rows use the adapters as they were when their
    version was published.

    Args:
        policy: base and adapters.
        max_batch_size: completions that run at once.
        cache_gib: memory for keys and values; calls that would need more wait for others to end.
        version: of the adapters as they are.
        cpu_threads: threads of torch that share its operations on a CPU; None: as many as serve the
            base best.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_batch_size: int = 256,
        cache_gib: float = 4.0,
        version: int = 0,
        cpu_threads: int | None = None,
    ) -> None:
        self._policy = policy
        self._cpu_threads = cpu_threads or policy.decode_threads
        self._max_batch_size = max_batch_size
        self._version = version
        self._cache_gib = cache_gib
        fitting = cache_gib * 2**30 / bytes_per_token(policy.config, policy.dtype)
        self._max_tokens = int(fitting * (1 - _KEPT_SHARE))
        most = _PREFILL_CUDA_BYTES if policy.device.type == "cuda" else _PREFILL_BYTES
        each = bytes_per_token(policy.config, policy.dtype)
        self._prefill_tokens = min(_PREFILL_TOKENS, max(1, most // each))
        self._prefixes = Prefixes(int(fitting * _KEPT_SHARE))
        self.prefilled_tokens = 0
        """Prompt tokens that went through the model so far."""
        self._arrived: list[Waiting] = []
        self._queue: deque[Waiting] = deque()
        self._changed = threading.Condition()
        # Held while calls are between the lists below, and while the model runs.
        self._turning = threading.Lock()
        self._gate: Gate | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        self._rows: list[Running] = []
        self._between: list[Running] = []
        """Calls that are in no other list: they are about to join the batch, or to be answered."""
        self._beginning: SharedBeginning | None = None
        """What the prompts of the running rows have in common."""
        self._answered = 0
        """Rows released since calls were admitted last: so many callers may follow."""
        self._steps = 0
        """Steps since the first of them."""
        policy.publish()
        _engines.add(self)
        self._cache = RowCache(policy.config, policy.device, self._max_tokens)

    def codec(self, agent: str | None) -> ChatCodec:
        """The codec of the one base model behind all agents."""
        return self._policy.codec

    def publish(self, version: int, values: AdapterValues | None = None) -> None:
        """Sample from the policy's weights as they are now, or as they were when copied.

        Args:
            version: what completions will say that they come from.
            values: copies of adapter weights; None: the adapters as they are.

        Raises:
            EngineError: completions are running. Cancelled ones are waited for.
        """
        while True:
            with self._turning, self._changed:
                waiting = [call.future for call in (*self._arrived, *self._queue)]
                waiting += [row.future for row in (*self._rows, *self._between)]
                if not waiting:
                    self._policy.publish(values)
                    self._prefixes.clear()
                    self._version = version
                    return
            if not all(future.cancelled() for future in waiting):
                raise EngineError("weights cannot change while completions are running")
            time.sleep(_LEAVING_SECONDS)

    def use_gate(self, gate: Gate | None) -> None:
        """Wait for `gate` before calls join the batch, so that batches are the same every run.

        What earlier calls left is forgotten: whether it is there would change the last bits.
        """
        self._gate = gate
        with self._changed:
            if gate is not None and not self._has_work():
                self._prefixes.clear()

    def submit(self, request: GenerationRequest) -> Future[Completion]:
        """Queue a request.

        Raises:
            EngineError: the engine is closed, or does not know the agent.
            PromptTooLongError: the prompt leaves no room for a token.
            ConfigError: the grammar cannot be compiled, or its library is not installed.
            ModelError: the model's tokenizer cannot be constrained.
        """
        if request.agent is not None and request.agent not in self._policy.agents:
            raise EngineError(
                f"no adapter {request.agent!r}; this engine has {', '.join(self._policy.agents)}"
            )
        room = self._policy.codec.context_length - len(request.prompt_ids)
        if room < 1 or not request.prompt_ids:
            raise PromptTooLongError(
                f"prompt of {request.agent or 'the base'} has {len(request.prompt_ids)} tokens; "
                f"the context of {self._policy.codec.context_length} needs room for an answer"
            )
        if max(request.prompt_ids) >= self._policy.vocabulary:
            token = max(request.prompt_ids)
            raise EngineError(
                f"a prompt of {request.agent or 'the base'} has the token {token}, and the model "
                f"knows only those below {self._policy.vocabulary}: the tokenizer has tokens that "
                "the model has not"
            )
        needed = self._most_tokens(request)
        if needed > self._max_tokens:
            raise EngineError(
                f"a call of up to {needed} tokens does not fit into cache_gib={self._cache_gib:g}, "
                f"which holds {self._max_tokens} tokens of running calls; raise it, or lower "
                "max_new_tokens"
            )
        if request.grammar:
            self._policy.grammars.compile(request.grammar)  # refused here, not in the thread
        future: Future[Completion] = Future()
        allowed = math.inf if request.timeout is None else request.timeout
        with self._changed:
            if self._closed:
                raise EngineError("the engine is closed")
            self._arrived.append(Waiting(request, future, time.monotonic() + allowed))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="marft-engine", daemon=True)
                self._thread.start()
            self._changed.notify()
        return future

    def close(self) -> None:
        """Stop the thread; what still waits fails with `EngineError`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join(timeout=60)
        self._fail_all(EngineError("the engine was closed"))

    def _run(self) -> None:
        if self._cpu_threads is not None:
            torch.set_num_threads(self._cpu_threads)  # of this thread: torch counts for each
        while self._wait_for_work():
            try:
                self._turn()
            except BaseException as error:  # callers wait: the thread must never die
                logger.exception("the local engine failed")
                if self._rows or self._between:  # calls that wait may yet go well
                    self._fail([*self._rows, *self._between], error)
                    self._rows.clear()
                    self._between.clear()
                    _free_memory()
                else:
                    self._fail_all(_failure(error))

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not (self._closed or self._has_work()):
                if not self._changed.wait(timeout=_IDLE_SECONDS):
                    break
            if self._closed or not self._has_work():
                self._thread = None
                return False
            return True

    def _has_work(self) -> bool:
        return bool(self._arrived or self._queue or self._rows)

    def _fail_all(self, error: EngineError) -> None:
        with self._changed:
            waiting = [call.future for call in (*self._arrived, *self._queue)]
            waiting += [row.future for row in (*self._rows, *self._between)]
            self._arrived.clear()
            self._queue.clear()
            self._rows.clear()
            self._between.clear()
        for future in waiting:
            with contextlib.suppress(Exception):  # cancelled or resolved meanwhile
                future.set_exception(error)

    def _fail(self, rows: Sequence[Running], error: BaseException) -> None:
        """Give some calls an error; the others go on."""
        for row in rows:
            with contextlib.suppress(Exception):  # cancelled or resolved meanwhile
                row.future.set_exception(_failure(error, row.request.agent))

    def _turn(self) -> None:
        """Admit what may join, then release what is finished, or decode a token for every row."""
        may_admit = self._may_admit()
        if may_admit and self._gate is not None and (self._answered or not self._rows):
            self._gate.wait()
        with self._turning, torch.inference_mode():
            if may_admit:
                self._admit()
            if self._rows and not self._release():
                self._decode()

    def _may_admit(self) -> bool:
        """Whether now is the time to admit calls; a matter of counts only where there is a gate."""
        if self._gate is None or not self._rows or not self._answered:
            return True
        return self._steps >= _STEPS_TOGETHER or self._answered >= _MANY * len(self._rows)

    def _admit(self) -> None:
        """Move waiting calls into the batch, as many as fit.

        What arrived before goes first; calls that arrived together go in the order of their keys.
        """
        self._answered = self._steps = 0
        with self._changed:
            self._queue.extend(sorted(self._arrived, key=lambda call: call.request.order))
            self._arrived.clear()
            late = self._drop_ended()
            new = self._between
            longest = max((self._most_tokens(row.request) for row in self._rows), default=0)
            while self._queue and len(self._rows) + len(new) < self._max_batch_size:
                longest = max(longest, self._most_tokens(self._queue[0].request))
                if (len(self._rows) + len(new) + 1) * longest > self._max_tokens:
                    break
                call = self._queue.popleft()
                try:
                    new.append(self._new_row(call))
                except Exception as error:  # noqa: BLE001 - this call's alone
                    late.append((call.future, _failure(error, call.request.agent)))
        for future, problem in late:  # outside the lock: who waits for them may submit again
            if future.set_running_or_notify_cancel():
                future.set_exception(problem)
        if new:
            self._join(list(new))
            new.clear()
            self._beginning = self._shared_beginning()

    def _join(self, new: Sequence[Running]) -> None:
        """Prefill new calls; where that fails, each prompt by itself, and only its calls fail."""
        prompts: dict[Prompt, list[Running]] = {}
        for row in new:
            prompts.setdefault((row.request.agent, row.request.prompt_ids), []).append(row)
        try:
            self._prefill(prompts)
            return
        except Exception as error:
            if len(prompts) == 1:
                logger.exception("the local engine failed on a call")
            failure = error.with_traceback(None)  # whose frames hold tensors
        self._rows = [row for row in self._rows if row.ids]  # the last ones had no token yet
        _free_memory()
        for rows in prompts.values():
            without_token = [row for row in rows if not row.ids]
            if len(prompts) > 1 and without_token:
                self._join(without_token)
            else:
                self._fail(without_token, failure)

    def _drop_ended(self) -> list[tuple[Future[Completion], MarftError]]:
        """Take calls that were cancelled or are too late out of the queue; the latter's errors."""
        late: list[tuple[Future[Completion], MarftError]] = []
        kept: deque[Waiting] = deque()
        now = time.monotonic()
        for call in self._queue:
            if call.future.cancelled():
                continue
            if now >= call.deadline:
                late.append((call.future, call.too_late("waiting for a place in the batch")))
            else:
                kept.append(call)
        self._queue = kept
        return late

    def _most_tokens(self, request: GenerationRequest) -> int:
        """So many tokens of cache a call may come to need: its prompt and its longest answer."""
        room = self._policy.codec.context_length - len(request.prompt_ids)
        return len(request.prompt_ids) + max(1, min(request.sampling.max_tokens, room))

    def _new_row(self, waiting: Waiting) -> Running:
        request = waiting.request
        limit = self._most_tokens(request) - len(request.prompt_ids)
        uniforms = np.random.Generator(np.random.Philox(key=request.seed)).random(limit)
        row = Running(waiting, limit, uniforms.tolist())
        if request.grammar:
            row.grammar = self._policy.grammars.follow(request.grammar)
        return row

    def _prefill(self, waiting: Mapping[Prompt, Sequence[Running]]) -> None:
        """Run distinct prompts, copy their caches for their rows, sample the first tokens."""
        prompts = list(waiting)
        count = sum(map(len, waiting.values()))
        tokens = [row.cached for row in self._rows] + [len(ids) for _, ids in prompts]
        self._cache.reserve(len(self._rows) + count, max(tokens) + 1)
        for batch in prefill(self._policy, prompts, self._prefixes, self._prefill_tokens):
            self.prefilled_tokens += batch.computed
            rows: list[Running] = []
            source: list[int] = []
            for place, index in enumerate(batch.members):
                own = waiting[prompts[index]]
                rows += own
                source += [place] * len(own)
            self._cache.insert(
                len(self._rows),
                batch.cache,
                [batch.row_M[place] for place in source],
                [batch.paths[place] for place in source],
            )
            self._rows += rows
            self._sample(rows, batch.logits_MV[torch.tensor(source, device=self._policy.device)])

    def _decode(self) -> None:
        """Sample one token for every row."""
        self._steps += 1
        rows = self._rows
        device = self._policy.device
        lengths = [row.cached for row in rows]
        longest = max(lengths)
        self._cache.reserve(len(rows), longest + 1)
        length_B = torch.tensor(lengths, device=device)
        self._cache.prepare(length_B, longest)
        is_seen_BL = torch.arange(longest + 1, device=device) <= length_B.unsqueeze(-1)
        ids_B = torch.tensor([row.ids[-1] for row in rows], device=device)
        with self._policy.using_rows([row.request.agent for row in rows]):
            hidden_BH = self._policy.step(
                ids_B,
                position_B=length_B,
                is_seen_BL=is_seen_BL,
                cache=self._cache,
                beginning=self._beginning,
            )
            logits_BV = self._policy.logits(hidden_BH)
        self._sample(rows, logits_BV)

    def _shared_beginning(self) -> SharedBeginning | None:
        groups: dict[Prompt, list[int]] = {}
        for place, row in enumerate(self._rows):
            prompt = row.request.agent, row.request.prompt_ids
            groups.setdefault(prompt, []).append(place)
        length = min((len(ids) for _, ids in groups), default=0)
        if not SharedBeginning.pays(len(groups), len(self._rows), length):
            return None
        return SharedBeginning(list(groups.values()), length, self._policy.device)

    def _sample(self, rows: Sequence[Running], logits_BV: Tensor) -> None:
        if any(row.grammar is not None for row in rows):
            logits_BV = constrain(rows, logits_BV)
        temperature_B = torch.tensor(
            [row.request.sampling.temperature for row in rows], device=logits_BV.device
        )
        uniform_B = torch.tensor(
            [row.uniforms[len(row.ids)] for row in rows],
            device=logits_BV.device,
            dtype=torch.float32,
        )
        token_B, logprob_B = sample(logits_BV, temperature_B, uniform_B)
        for row, token, logprob in zip(rows, token_B.tolist(), logprob_B.tolist(), strict=True):
            row.ids.append(token)
            row.logprobs.append(logprob)
            if row.grammar is None:
                continue
            try:
                row.grammar.accept(token)
            except Exception as error:  # noqa: BLE001 - this call's alone
                row.failure, row.grammar = _failure(error, row.request.agent), None

    def _release(self) -> bool:
        """Answer finished rows and pack the others to the front; whether there were any."""
        now = time.monotonic()
        finished = [(row, reason) for row in self._rows if (reason := self._finished(row, now))]
        if not finished:
            return False
        self._keep_prefixes([row for row, _ in finished])
        self._between = [row for row, _ in finished]
        self._pack(set(self._between))
        if not self._rows and not self._queue and not self._arrived:
            self._cache.release()  # an update may need the memory
        self._beginning = self._shared_beginning()
        if not self._answered:
            self._steps = 0
        self._answered += len(finished)
        for row, reason in finished:
            if not row.future.set_running_or_notify_cancel():
                continue
            if row.failure is not None:
                row.future.set_exception(row.failure)
                continue
            row.future.set_result(
                Completion(
                    tuple(row.ids),
                    tuple(row.logprobs),
                    reason,
                    self._version,
                    is_constrained=row.grammar is not None,
                )
            )
        self._between.clear()
        return True

    def _pack(self, finished: Set[Running]) -> None:
        """Take rows out, and move the last of the others into their places."""
        rows = self._rows
        count = len(rows) - len(finished)
        holes = [place for place, row in enumerate(rows[:count]) if row in finished]
        movers = [place for place in range(count, len(rows)) if rows[place] not in finished]
        for source, target in zip(movers, holes, strict=True):
            self._cache.move(source, target)
            rows[target] = rows[source]
        self._rows = rows[:count]

    def _keep_prefixes(self, finished: Sequence[Running]) -> None:
        """Keep what finished rows computed, for calls that begin with it."""
        places = {row: place for place, row in enumerate(self._rows)}
        for row in finished:
            ids = (row.request.prompt_ids + tuple(row.ids))[: row.cached]
            if row.failure is None and self._prefixes.wants(ids):
                layers = self._cache.copy(places[row], row.cached)
                self._prefixes.put(row.request.agent, ids, layers)

    def _finished(self, row: Running, now: float) -> FinishReason | None:
        waiting, ids = row.waiting, row.ids
        if waiting.future.cancelled() or row.failure is not None:
            return "stop"
        if ids[-1] in self._policy.end_ids:
            return "stop"
        stop = waiting.request.sampling.stop
        if stop and any(word in self._policy.codec.decode(ids) for word in stop):
            return "stop"
        if len(ids) >= row.limit:
            return "length"
        if now >= waiting.deadline:
            row.failure = waiting.too_late(f"being answered, with {len(ids)} tokens so far")
            return "stop"
        return None


def _failure(error: BaseException, agent: str | None = None) -> EngineError:
    """What is raised for calls that an error of the engine ends."""
    where = f" on a call of {agent_of_adapter(agent)}" if agent else ""
    failure = EngineError(f"the local engine failed{where}: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


_engines: weakref.WeakSet[LocalEngine] = weakref.WeakSet()


@atexit.register
def _close_engines() -> None:
    """A daemon thread inside torch when the interpreter ends would abort the process."""
    for engine in list(_engines):
        engine.close()
