"""`FakeEngine`: scripted answers for tests, examples and dry runs.

Like a real engine it has a codec, a thread of its own that answers in the order of the requests,
and honours `max_tokens` and `stop`; it just has no model. Its tokens are bytes.
"""

from __future__ import annotations

import inspect
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage

from marft_graph.engine.base import Completion, Gate, GenerationRequest
from marft_graph.episode import FinishReason
from marft_graph.errors import EngineError
from marft_graph.names import agent_of_adapter
from marft_graph.policy.forms import one_of

Answer = str | AIMessage | Exception
Answerer = Callable[..., Answer]
Script = str | Answerer | Mapping[str, str | Sequence[str] | Answerer]

END_OF_SEQUENCE = 256
_LOGPROB = -math.log(257)
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class ByteCodec:
    """Chat messages to bytes and back: token ids are UTF-8 bytes, 256 ends a sequence.

    >>> codec = ByteCodec()
    >>> codec.parse([*b"forty-two", 256]).content
    'forty-two'
    """

    def __init__(self, context_length: int = 1 << 20) -> None:
        self._context_length = context_length

    @property
    def context_length(self) -> int:
        """Most tokens that prompt and completion may have together."""
        return self._context_length

    def render(
        self, messages: Sequence[BaseMessage], tools: Sequence[dict[str, Any]] = ()
    ) -> tuple[int, ...]:
        """One line of role and text for each message, after the tools."""
        lines = [f"tools: {json.dumps(list(tools))}"] if tools else []
        for message in messages:
            calls = message.tool_calls if isinstance(message, AIMessage) else []
            lines.append(f"{message.type}: {message.text}{_tool_call_text(calls)}")
        return tuple("\n".join([*lines, "ai: "]).encode())

    def parse(
        self,
        completion_ids: Sequence[int],
        *,
        stop: Sequence[str] = (),
        tools: Sequence[dict[str, Any]] = (),
    ) -> AIMessage:
        """The text before the first stop string, with `<tool_call>` blocks as tool calls."""
        data = bytes(token for token in completion_ids if token != END_OF_SEQUENCE)
        text = data.decode(errors="replace")
        for mark in stop:
            text = text.partition(mark)[0]
        content, calls, invalid = "", [], []
        head, *blocks = text.split(_OPEN)
        content = head
        for position, block in enumerate(blocks):
            body, _, rest = block.partition(_CLOSE)
            content += rest
            call_id = f"call_{position}"
            try:
                call = json.loads(body)
                calls.append({"name": call["name"], "args": call["args"], "id": call_id})
            except (ValueError, KeyError, TypeError) as error:
                broken = {"name": None, "args": body, "id": call_id, "error": str(error)}
                invalid.append(broken)
        return AIMessage(content=content, tool_calls=calls, invalid_tool_calls=invalid)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of bytes, the end of a sequence left out."""
        return bytes(token for token in ids if token != END_OF_SEQUENCE).decode(errors="replace")

    def answer_grammar(self, schema: Mapping[str, Any]) -> str:
        """The schema itself."""
        return json.dumps(schema)

    @property
    def shows_tools(self) -> bool:
        """Always: in the first line."""
        return True

    def tool_call_grammar(self, tools: Sequence[dict[str, Any]]) -> str:
        """A `<tool_call>` block; no byte is kept from writing anything else."""
        return one_of(
            [
                f'{_OPEN}{{"name": {json.dumps(tool["function"]["name"])}, "args": ',
                tool["function"].get("parameters") or {},
                f"}}{_CLOSE}",
            ]
            for tool in tools
        )


class FakeEngine:
    """An engine that answers from a script.

    Args:
        script: one answer for everything; or a function `(request)`, `(agent, messages)` or
            `(agent, messages, tools)`; or, for each agent, an answer, a list of answers (used in
            turn, over and over) or such a function. An answer is a text, an `AIMessage` (with tool
            calls, say) or an exception, which the model call raises.
        delay: seconds before an answer.
        context_length: prompt and completion tokens (bytes) that fit.

    >>> from marft_graph.engine.base import SamplingSettings
    >>> engine = FakeEngine({"actor": "12"})
    >>> prompt = engine.codec("actor").render([])
    >>> request = GenerationRequest("actor", prompt, SamplingSettings())
    >>> bytes(engine.submit(request).result().ids[:-1])
    b'12'
    >>> engine.close()
    """

    def __init__(
        self, script: Script, *, delay: float = 0.0, context_length: int = 1 << 20
    ) -> None:
        self.requests: list[GenerationRequest] = []
        """What was asked, in the order of the answers."""
        self.adapter_version = 0
        self._script = script
        self._delay = delay
        self._codec = ByteCodec(context_length)
        self._turns: dict[str, int] = {}
        self._gate: Gate | None = None
        self._waiting: list[tuple[float, GenerationRequest, Future[Completion]]] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def codec(self, agent: str | None) -> ByteCodec:
        """The byte codec, the same for every agent."""
        return self._codec

    def use_gate(self, gate: Gate | None) -> None:
        """Wait for `gate` before each round of answers; None: answer at once."""
        self._gate = gate

    def submit(self, request: GenerationRequest) -> Future[Completion]:
        """Queue a request; the engine's own thread answers it."""
        future: Future[Completion] = Future()
        with self._changed:
            if self._is_closed:
                raise EngineError("the engine is closed; make a new FakeEngine")
            self._waiting.append((time.monotonic() + self._delay, request, future))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._serve, name="marft-fake-engine", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()
        return future

    def close(self) -> None:
        """Stop; pending futures fail with `EngineError`."""
        with self._changed:
            self._is_closed = True
            pending, self._waiting = self._waiting, []
            self._changed.notify_all()
        for _, _, future in pending:
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineError("the engine was closed before it answered"))

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._is_closed:
                    self._changed.wait()
                if self._is_closed:
                    return
            gate = self._gate
            if gate is not None:
                gate.wait()
            for request, future in self._due():
                if future.set_running_or_notify_cancel():
                    self._resolve(request, future)

    def _due(self) -> list[tuple[GenerationRequest, Future[Completion]]]:
        """Requests whose delay is over, in their order; waits a little where there is none."""
        with self._changed:
            now = time.monotonic()
            due = [entry for entry in self._waiting if entry[0] <= now]
            self._waiting = [entry for entry in self._waiting if entry[0] > now]
            if not due and self._waiting:
                self._changed.wait(min(entry[0] for entry in self._waiting) - now)
        due.sort(key=lambda entry: entry[1].order)
        return [(request, future) for _, request, future in due]

    def _resolve(self, request: GenerationRequest, future: Future[Completion]) -> None:
        self.requests.append(request)
        try:
            answer = self._answer(request)
            if isinstance(answer, Exception):
                raise answer
            completion = self._completion(answer, request)
        except StopIteration as stop:  # an awaited future does not take one
            error = EngineError(f"the script has no more answers, for {request.agent!r}")
            error.__cause__ = stop
            future.set_exception(error)
        except BaseException as error:  # noqa: BLE001 - the script's own error is the caller's to see
            future.set_exception(error)
        else:
            future.set_result(completion)

    def _answer(self, request: GenerationRequest) -> Answer:
        agent = request.agent or "base"
        answer: Any = self._script
        if isinstance(self._script, Mapping):
            answer = self._script.get(agent, self._script.get(agent_of_adapter(agent)))
            if answer is None:
                known = ", ".join(map(repr, self._script)) or "nothing"
                raise EngineError(
                    f"the script has no answer for {agent_of_adapter(agent)!r}; it has {known}"
                )
        if callable(answer):
            given = (agent, list(request.messages), list(request.tools))
            count = len(inspect.signature(answer).parameters)
            answer = answer(request) if count == 1 else answer(*given[:count])
        elif isinstance(answer, Sequence) and not isinstance(answer, str):
            turn = self._turns.get(agent, 0)
            self._turns[agent] = turn + 1
            answer = answer[turn % len(answer)]
        if not isinstance(answer, str | AIMessage | Exception):
            raise EngineError(
                f"the script answered {answer!r} for {agent_of_adapter(agent)!r}; an "
                "answer is a text, an AIMessage or an exception"
            )
        return answer

    def _completion(self, answer: str | AIMessage, request: GenerationRequest) -> Completion:
        if isinstance(answer, AIMessage):
            text = f"{answer.text}{_tool_call_text(answer.tool_calls)}"
        else:
            text = answer
        ends = [text.find(mark) + len(mark) for mark in request.sampling.stop if mark in text]
        ids = [*text[: min(ends)].encode()] if ends else [*text.encode(), END_OF_SEQUENCE]
        limit = request.sampling.max_tokens
        reason: FinishReason = "stop" if len(ids) <= limit else "length"
        ids = ids[:limit]
        return Completion(tuple(ids), (_LOGPROB,) * len(ids), reason, self.adapter_version)


def _tool_call_text(calls: Sequence[Any]) -> str:
    return "".join(
        f"{_OPEN}{json.dumps({'name': call['name'], 'args': call['args']})}{_CLOSE}"
        for call in calls
    )
