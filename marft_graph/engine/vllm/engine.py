"""The vLLM engine: token ids in, token ids and log-probs out, on servers of vLLM.

Every published version of an adapter gets a name of its own at the servers. A call names the
version that it wants; a server without it refuses, and an answer from another model is an error.

Determinism has limits here. A call's seed is passed on, but vLLM's arithmetic depends on what else
is in its batch, so that the same call may end in another token in another run; with bfloat16 the
log-probs differ from the learner's in the second digit. `importance_cap` corrects for that.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from urllib.parse import urlsplit

import torch
from langchain_core.messages import HumanMessage
from safetensors.torch import load_file, save_file

from marft_graph.agents import Agent
from marft_graph.config import TrainConfig
from marft_graph.engine.base import ChatCodec, Completion, GenerationRequest
from marft_graph.engine.vllm.calls import NO_GRAMMAR, Publication, ServedModel, VersionedCalls
from marft_graph.engine.vllm.client import ServersForWorkers
from marft_graph.engine.vllm.endpoint import Adapter, Endpoint, Probe
from marft_graph.engine.vllm.fleet import Server
from marft_graph.engine.vllm.pool import ServerPool
from marft_graph.engine.vllm.server import ServerProcess, require_vllm, server_command
from marft_graph.errors import ConfigError, EngineError
from marft_graph.policy.adapters import Policy
from marft_graph.policy.lora import AdapterValues
from marft_graph.policy.team import Team
from marft_graph.ranks import Ranks

_UNLOAD_SECONDS = 10.0


class VllmEngine:
    """Samples on vLLM servers; thread-safe.

    Args:
        policy: the base and adapters that the learner trains. Its weights are read by `publish`
            alone, so they may change while completions run.
        pool: the servers, not started yet.
        folder: where versions of adapters are written; the servers must see it under this path.
        ranks: processes that train together. The first one's adapters and folder serve them all;
            they publish together.

    `publish` must be called once before calls are submitted: it starts what has to be started.
    """

    def __init__(
        self, policy: Policy, pool: ServerPool, folder: Path, ranks: Ranks | None = None
    ) -> None:
        self._policy = policy
        self._ranks = ranks or Ranks()
        self._pool = pool
        self._folder = folder.absolute()
        self._calls = VersionedCalls(served_model(policy), pool, functools.partial(_retire, pool))
        self._untouched: Adapter | None = None
        self._is_started = False
        self._close = weakref.finalize(self, _close, pool, self._folder)

    def codec(self, agent: str | None) -> ChatCodec:
        """The codec of the base model behind all agents."""
        return self._policy.codec

    def publish(self, version: int, values: AdapterValues | None = None) -> None:
        """Give the servers new adapters; calls submitted from now on ask for them.

        The ones before are unloaded once no call asks for them any more.

        Args:
            version: what completions will say that they come from.
            values: copies of adapter weights; None: the adapters as they are.

        Raises:
            EngineError: no server could take them in time; the message has each server's reason.
            DistributedError: another process could not.
        """
        if not self._close.alive:
            raise EngineError("the engine is closed")
        if not self._is_started:
            self._is_started = True
            shutil.rmtree(self._folder, ignore_errors=True)  # of a run that was killed
            self._pool.start(base_probe(self._policy))
        # All processes know the versions by the first one's names; a server has each of them once.
        new = self._ranks.by_first(lambda: self._written(version, values))
        try:
            self._ranks.together(lambda: self._load(new))
        except BaseException:
            _retire(self._pool, new)
            raise
        self._calls.use(new)

    def _written(self, version: int, values: AdapterValues | None) -> Publication:
        """The adapters, in a folder of their own."""
        # A version may be published twice with other weights, after a collapse say.
        mark = secrets.token_hex(4)
        new = Publication(version, self._folder / f"v{version}-{mark}")
        for agent in self._policy.agents:
            folder = new.folder / agent
            self._policy.save_adapter(agent, folder, values)
            new.adapters[agent] = Adapter(f"{agent}@v{version}-{mark}", folder)
        if self._untouched is None:
            self._untouched = self._base_adapter(new.adapters[self._policy.agents[0]])
        new.adapters[None] = self._untouched
        return new

    def _load(self, new: Publication) -> tuple[()]:
        self._pool.load(new.own_adapters())
        return ()

    def submit(self, request: GenerationRequest) -> Future[Completion]:
        """Queue a request for the version that was published last.

        Raises:
            EngineError: nothing was published yet, the engine is closed, or does not know the
                agent.
            PromptTooLongError: the prompt leaves no room for a token.
            ConfigError: the request has a grammar, or a temperature that vLLM would change.
        """
        return self._calls.submit(request)

    def held(self) -> AbstractContextManager[Publication]:
        """What was published last, which stays at the servers until the context ends.

        Raises:
            EngineError: nothing was published yet.
        """
        return self._calls.held()

    def for_workers(self) -> ServersForWorkers:
        """What another process needs to know to sample at the same servers."""
        return ServersForWorkers(
            model=served_model(self._policy),
            addresses=self._pool.addresses(),
            probe=base_probe(self._policy),
        )

    def stats(self) -> dict[str, int]:
        """What happened to the servers so far, see `ServerPool.stats`."""
        return self._pool.stats()

    def close(self) -> None:
        """Fail what waits, stop servers of ours, and remove the adapters' folders."""
        published = self._calls.published
        if published is not None and self._close.alive:
            every = list(published.adapters.values())
            with contextlib.suppress(EngineError, TimeoutError):
                self._pool.unload(every).result(timeout=_UNLOAD_SECONDS)
        self._close()

    def _base_adapter(self, like: Adapter) -> Adapter:
        """The base as an adapter that changes nothing; it is loaded when it is first asked for.

        A call to the base itself is wrong on vLLM's CPU build (0.32) whenever other calls of its
        batch have an adapter: the base's tokens get the last adapter too (index -1 of the stack in
        `lora/ops/torch_ops`).
        """
        mark = secrets.token_hex(4)
        folder = self._folder / f"base-{mark}"
        shutil.copytree(like.folder, folder)
        weights = load_file(folder / "adapter_model.safetensors")
        zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        save_file(zeros, folder / "adapter_model.safetensors", {"format": "pt"})
        return Adapter(f"base@{mark}", folder)


def vllm_engine(
    team: Team,
    agents: Sequence[Agent],
    config: TrainConfig,
    run_dir: Path,
    ranks: Ranks | None = None,
) -> VllmEngine:
    """The engine on the servers that the settings name, or on one that is started for the run.

    Nothing is started or written before the first `publish`.

    Raises:
        ConfigError: the settings ask for what this engine cannot do, or vLLM is not installed.
    """
    check_engine_settings(config)
    if len(team.policies) > 1:
        raise ConfigError(
            f"per_node: the agents stand on {len(team.policies)} base models; engine vllm serves "
            "one (use engine local, or one base_model)"
        )
    policy = team.policies[0]
    servers = (
        [_found(url, config) for url in config.engine_urls]
        if config.engine_urls
        else [_started(agents, config, run_dir, on_cpu=policy.device.type == "cpu")]
    )
    pool = ServerPool(servers, in_flight=config.max_batch_size, patience=config.engine_patience)
    return VllmEngine(policy, pool, run_dir / "served_adapters", ranks)


def base_probe(policy: Policy) -> Probe:
    """A prompt, and the log-probs of the policy's base for the token after it."""
    ids = policy.codec.render([HumanMessage("What is 12 plus 30?")])
    with policy.using(None), torch.no_grad():
        states = policy.hidden(torch.tensor([ids], device=policy.device))
        logprobs = policy.logits(states[0, -1:]).float().log_softmax(-1)
    return Probe(ids, logprobs[0].tolist())


def check_engine_settings(config: TrainConfig) -> None:
    """Refuse settings that cannot go together, before anything is loaded.

    Raises:
        ConfigError: the message says which, and what would do.
    """
    if config.engine == "local":
        if config.engine_urls:
            raise ConfigError("engine_urls needs engine vllm, and engine is local")
        return
    if config.constrain_output:
        raise ConfigError(NO_GRAMMAR)
    for url in config.engine_urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"engine_urls has {url!r}; a server's URL is like http://127.0.0.1:8000"
            )
    if len(set(config.engine_urls)) < len(config.engine_urls):
        raise ConfigError(f"engine_urls names a server twice: {', '.join(config.engine_urls)}")
    if not config.engine_urls:
        if config.quantization != "none":
            raise ConfigError(
                f"quantization is {config.quantization}; the server that engine vllm starts would "
                "sample from another base than is trained. Use quantization none or engine local"
            )
        require_vllm(config.vllm_python)


def served_model(policy: Policy) -> ServedModel:
    """What calls need to know of a policy whose base is served."""
    return ServedModel(
        agents=policy.agents,
        codec=policy.codec,
        end_ids=tuple(sorted(policy.end_ids)),
        vocabulary=policy.vocabulary,
    )


def _found(url: str, config: TrainConfig) -> Server:
    """A server that somebody else runs."""
    key = os.environ.get("VLLM_API_KEY", "")
    return Server(Endpoint(url, api_key=key, timeout=config.engine_timeout))


def _started(
    agents: Sequence[Agent], config: TrainConfig, run_dir: Path, *, on_cpu: bool
) -> Server:
    """A server that this run starts and stops."""
    named = agents[0].base_model
    base = Path(os.path.expanduser(named))
    command = server_command(
        str(base.resolve()) if base.is_dir() else named,
        dtype=config.dtype,
        max_rank=max(agent.rank for agent in agents),
        adapters=len(agents) + 1,  # and the base as one
        on_cpu=on_cpu,
        trust_remote_code=config.trust_remote_code,
        more=config.vllm_args,
    )
    process = ServerProcess(require_vllm(config.vllm_python), command, run_dir / "vllm.log")
    endpoint = Endpoint(
        process.url, api_key=process.api_key, timeout=config.engine_timeout, trust_env=False
    )
    return Server(endpoint, process)


def _retire(pool: ServerPool, publication: Publication) -> None:
    """Unload a version that nobody asks for, then remove its folder."""
    try:
        done = pool.unload(publication.own_adapters())
    except EngineError:  # closed: the whole folder is removed then
        return
    done.add_done_callback(lambda _: shutil.rmtree(publication.folder, ignore_errors=True))


def _close(pool: ServerPool, folder: Path) -> None:
    pool.close()
    shutil.rmtree(folder, ignore_errors=True)
