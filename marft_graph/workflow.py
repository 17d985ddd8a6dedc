"""Targets of the command line: a workflow folder, a Python file's variable, a langgraph.json."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from langgraph.graph import StateGraph
from langgraph.pregel import Pregel

from marft_graph.apps.factories import graph_from
from marft_graph.apps.importing import import_problem, load_module
from marft_graph.apps.langgraph_json import read_langgraph_json
from marft_graph.config import read_yaml
from marft_graph.errors import GraphError, WorkflowError
from marft_graph.rollout.inputs import AppInputs, InputFunction
from marft_graph.rollout.rewards import as_reward_function

_VALUES = ("context", "configurable", "store")
"""What a task.py may define as a value or as a function of the example."""


@dataclass(frozen=True, slots=True)
class Workflow:
    """A graph and, where its folder has a task.py and a config.yaml, how to train it."""

    name: str
    path: Path
    graph: Any
    load_data: Callable[..., Any] | None = None
    reward: Callable[..., Any] | None = None
    inputs: InputFunction | None = None
    context: Any = None
    configurable: Any = None
    store: Any = None
    on_interrupt: Callable[..., Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """The parsed config.yaml; a relative `base_model` that exists is made absolute."""

    def parts(self) -> dict[str, Any]:
        """What its task.py says of how the app is called, by the names of `AppInputs`."""
        return {spec.name: getattr(self, spec.name) for spec in fields(AppInputs)}


def load_target(target: str) -> Workflow:
    """Load `FOLDER`, `FILE.py:VARIABLE` or `langgraph.json[:NAME]`.

    Raises:
        WorkflowError: something is missing, or the user's code raised; with file and line.
    """
    place, _, name = target.rpartition(":") if ":" in Path(target).name else (target, "", "")
    # The functions of os.path say no where those of Path raise: unknown users, names too long.
    path = Path(os.path.expanduser(place))
    if os.path.isdir(path):
        if (path / "graph.py").is_file():
            return _load_folder(path)
        if (path / "langgraph.json").is_file():
            return _load_langgraph_json(path / "langgraph.json", "")
        raise WorkflowError(
            f"{path} is no workflow folder: it has no graph.py and no langgraph.json"
        )
    if not os.path.isfile(path):
        raise WorkflowError(
            f"{place} does not exist; give a workflow folder, file.py:variable or a langgraph.json"
        )
    if path.suffix == ".json":
        return _load_langgraph_json(path, name)
    if path.suffix != ".py":
        raise WorkflowError(f"{place} is neither a Python file nor a langgraph.json")
    return Workflow(path.stem, path, _graph_in(load_module(path), name or "graph", path))


def _load_folder(path: Path) -> Workflow:
    settings = read_yaml(path / "config.yaml") if (path / "config.yaml").is_file() else {}
    own = settings.get("per_node")
    for place in (settings, *(own.values() if isinstance(own, dict) else ())):
        base = place.get("base_model") if isinstance(place, dict) else None
        if isinstance(base, str) and (path / base).is_dir():
            place["base_model"] = str((path / base).resolve())
    graph = _graph_in(load_module(path / "graph.py"), "graph", path / "graph.py")
    task = load_module(path / "task.py") if (path / "task.py").is_file() else None
    functions: dict[str, Any] = {name: getattr(task, name, None) for name in _VALUES}
    for name in ("load_data", "reward", "inputs", "on_interrupt"):
        function = getattr(task, name, None)
        if name == "reward" and isinstance(function, list | tuple | dict):
            function = as_reward_function(function)
        is_keys = name == "inputs" and isinstance(function, list | tuple)
        if function is not None and not is_keys and not callable(function):
            raise WorkflowError(f"{path / 'task.py'}: {name} must be a function")
        functions[name] = function
    return Workflow(path.resolve().name, path, graph, settings=settings, **functions)


def _load_langgraph_json(path: Path, name: str) -> Workflow:
    described = read_langgraph_json(path)
    name, place, variable = described.entry_of(name)
    described.set_environment()
    module = described.module_of(name, place)
    return Workflow(name, path, _graph_in(module, variable, place, named_in=path))


def _graph_in(
    module: ModuleType, name: str, place: Path | str, named_in: Path | None = None
) -> Any:
    """The graph in a module's variable, or what it makes."""
    where = f"{place}"
    if named_in is not None:
        where += f" (named in {named_in}{_line_with(named_in, f':{name}')})"
    if not hasattr(module, name):
        graphs = [k for k, v in vars(module).items() if isinstance(v, Pregel | StateGraph)]
        there = f"its graphs are: {', '.join(graphs)}" if graphs else "it has no graph"
        raise WorkflowError(f"{where} has no variable {name!r}; {there}")
    file = Path(module.__file__ or str(place))
    value = getattr(module, name)
    try:
        return graph_from(value)
    except GraphError as error:
        raise WorkflowError(f"{file}{_line_with(file, f'{name} = ')}: {error}") from error
    except WorkflowError as error:
        raise WorkflowError(f"{where}: {name} {error}") from error
    except (Exception, SystemExit) as error:
        raise WorkflowError(import_problem(file, error)) from error


def _line_with(path: Path, text: str) -> str:
    """`, line N` of the first line of a file that has a text; empty where none has."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((f", line {n}" for n, line in enumerate(lines, 1) if text in line), "")
