"""What a rollout worker is told: the app, who is trained, which adapters, which examples.

Everything here travels between processes. The user's code does so as a path that
every worker imports for itself, or else pickled.
"""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from marft_graph.agents import Agent
from marft_graph.config import TrainConfig
from marft_graph.engine.vllm.calls import Publication
from marft_graph.engine.vllm.client import ServersForWorkers
from marft_graph.errors import WorkflowError
from marft_graph.rollout.inputs import AppInputs
from marft_graph.rollout.rewards import RewardFunction
from marft_graph.workflow import load_target

_WHAT_WOULD_DO = (
    "Give `target`, a workflow folder or file.py:variable that every worker imports for itself, or "
    "set rollout_workers to 0"
)


@dataclass(frozen=True, slots=True)
class App:
    """The user's code as a worker gets it.

    With a `target`, what its files define is used; what they do not have is unpickled.
    """

    target: str | None
    parts: Mapping[str, bytes]
    """`graph`, `reward` and the fields of `AppInputs`, pickled; those that there are."""

    def load(self) -> tuple[Any, RewardFunction, AppInputs]:
        """Graph, reward and what the app is called with, in the process that calls this.

        Raises:
            WorkflowError: something cannot be imported here.
        """
        graph = reward = None
        parts: dict[str, Any] = {}
        if self.target is not None:
            loaded = load_target(self.target)
            graph, reward, parts = loaded.graph, loaded.reward, loaded.parts()
        graph = self._unpickled("graph") if graph is None else graph
        reward = self._unpickled("reward") if reward is None else reward
        for spec in dataclasses.fields(AppInputs):
            if parts.get(spec.name) is None:
                parts[spec.name] = self._unpickled(spec.name)
        if graph is None or reward is None:
            missing = "graph" if graph is None else "reward"
            raise WorkflowError(
                f"{self.target} has no {missing}, and the one that the trainer was given cannot be "
                "pickled; define it in the workflow folder's task.py"
            )
        return graph, reward, AppInputs(**parts)

    def _unpickled(self, name: str) -> Any:
        if name not in self.parts:
            return None
        from ray import cloudpickle

        try:
            return cloudpickle.loads(self.parts[name])
        except Exception as error:  # a pickle may run any code of the user's
            raise WorkflowError(
                f"the {name} does not load on a rollout worker: {type(error).__name__}: {error}. "
                "Its modules must be installed, or on PYTHONPATH, wherever workers run. "
                f"{_WHAT_WOULD_DO}"
            ) from error


def pack_app(graph: Any, reward: RewardFunction, app_inputs: AppInputs, target: str | None) -> App:
    """The user's code, ready to travel.

    Args:
        graph: a compiled app.
        reward: one reward function.
        app_inputs: how the app is called.
        target: where workers load all of it from, as the command line takes it; None: it is
            pickled.

    Raises:
        WorkflowError: something cannot be pickled, and there is no `target`.
    """
    values = {spec.name: getattr(app_inputs, spec.name) for spec in dataclasses.fields(app_inputs)}
    needed = {"reward": reward, **{name: v for name, v in values.items() if v is not None}}
    if target is None:
        needed = {"graph": graph, **needed}
    parts = {}
    for name, value in needed.items():
        try:
            parts[name] = pickled(value)
        except Exception as error:  # objects say in many ways that they cannot be pickled
            if target is not None:  # it may have its own
                continue
            raise WorkflowError(
                f"the {name} cannot be sent to rollout workers: {type(error).__name__}: {error}. "
                f"{_WHAT_WOULD_DO}"
            ) from error
    place = None if target is None else str(Path(target).expanduser().absolute())
    return App(place, parts)


def pickled(value: Any) -> bytes:
    """A value as cloudpickle writes it, but for marks such as `MISSING = object()` of a module.

    LangGraph recognises its own by identity: they are written as their module and name.
    """
    from ray import cloudpickle

    base: Any = cloudpickle.CloudPickler  # Ray has no types for it

    class Pickler(base):  # type: ignore[misc]
        def reducer_override(self, obj: Any) -> Any:
            place = _place_of(obj) if type(obj) is object else None
            if place is not None:
                return getattr, place
            return super().reducer_override(obj)

    with io.BytesIO() as file:
        pickler: Any = Pickler(file)
        pickler.dump(value)
        return file.getvalue()


def _place_of(mark: object) -> tuple[ModuleType, str] | None:
    """Module and name of a module's variable that is this object."""
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is mark:
                return module, name
    return None


@dataclass(frozen=True, slots=True)
class Job:
    """What stays the same for all work of a run."""

    release: str
    """Version of marft-graph that the learner runs."""
    app: App
    nodes: tuple[str, ...]
    adapters: Mapping[str, str]
    """Name of the agent that answers each node."""
    agents: tuple[Agent, ...]
    config: TrainConfig
    servers: ServersForWorkers | None
    """Where completions come from; None: from the worker's own copy of the models."""
    frozen: tuple[str, ...] = ()
    """Nodes whose own models answer on purpose."""


@dataclass(frozen=True, slots=True)
class Offer:
    """The adapters of one version, as the learner publishes them."""

    name: str
    """Names them uniquely: a version may be published twice with other weights."""
    version: int
    content: Mapping[str, bytes] | Publication
    """Each agent's weights in safetensors format, or what the servers have."""


@dataclass(frozen=True, slots=True)
class Work:
    """Some examples of a rollout, and the adapters to run them with."""

    offer: str
    """Name of the offer."""
    reference: Any
    """Where the offer is, in Ray's store; it is fetched by a worker that has another one."""
    examples: tuple[Mapping[str, Any], ...]
    first_example: int
    group_size: int
    seed: int
    greedy: bool

    def __str__(self) -> str:
        last = self.first_example + len(self.examples) - 1
        return f"the episodes of examples {self.first_example} to {last}"
