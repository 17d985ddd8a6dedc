"""Targets of the command line: a workflow folder, a Python file's variable, a langgraph.json."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from langgraph.graph import StateGraph
from langgraph.pregel import Pregel

from marft_graph.config import read_yaml
from marft_graph.errors import GraphError, WorkflowError
from marft_graph.graph.compile import as_compiled
from marft_graph.rollout.rewards import as_reward_function


@dataclass(frozen=True, slots=True)
class Workflow:
    """A graph and, where its folder has a task.py and a config.yaml, how to train it."""

    name: str
    path: Path
    graph: Any
    load_data: Callable[..., Any] | None = None
    reward: Callable[..., Any] | None = None
    inputs: Callable[[Mapping[str, Any]], Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """The parsed config.yaml; a relative `base_model` that exists is made absolute."""


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
    return Workflow(path.stem, path, _variable(path, name or "graph"))


def load_module(path: Path) -> ModuleType:
    """Import a Python file by its path, its folder on sys.path as when it is run.

    Raises:
        WorkflowError: the file cannot be imported; the message has its line and the cause.
    """
    name = f"marft_workflow_{path.resolve().parent.name}_{path.stem}_{abs(hash(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise WorkflowError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(name, None)
        if not isinstance(error, Exception | SystemExit):
            raise
        raise WorkflowError(_import_problem(path, error)) from error
    return module


def _load_folder(path: Path) -> Workflow:
    settings = read_yaml(path / "config.yaml") if (path / "config.yaml").is_file() else {}
    own = settings.get("per_node")
    for place in (settings, *(own.values() if isinstance(own, dict) else ())):
        base = place.get("base_model") if isinstance(place, dict) else None
        if isinstance(base, str) and (path / base).is_dir():
            place["base_model"] = str((path / base).resolve())
    graph = _variable(path / "graph.py", "graph")
    task = load_module(path / "task.py") if (path / "task.py").is_file() else None
    functions = {}
    for name in ("load_data", "reward", "inputs"):
        function = getattr(task, name, None)
        if name == "reward" and isinstance(function, list | tuple | dict):
            function = as_reward_function(function)
        if function is not None and not callable(function):
            raise WorkflowError(f"{path / 'task.py'}: {name} must be a function")
        functions[name] = function
    return Workflow(path.resolve().name, path, graph, settings=settings, **functions)


def _load_langgraph_json(path: Path, name: str) -> Workflow:
    try:
        graphs = json.loads(path.read_text(encoding="utf-8"))["graphs"]
        entries = {
            key: str(value if isinstance(value, str) else value["path"])
            for key, value in graphs.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WorkflowError(
            f'{path} must hold {{"graphs": {{"name": "./file.py:variable"}}}}: {error!r}'
        ) from error
    if name and name not in entries:
        raise WorkflowError(f"{path} has no graph {name!r}; it has {', '.join(entries)}")
    if not name and len(entries) != 1:
        raise WorkflowError(
            f"{path} has {len(entries)} graphs; say which: "
            + ", ".join(f"{path}:{entry}" for entry in entries)
        )
    name = name or next(iter(entries))
    file, _, variable = entries[name].rpartition(":")
    if not file:
        raise WorkflowError(
            f"{path}: graph {name!r} is {entries[name]!r}; it must be file.py:variable"
        )
    source = path.parent / file
    if not source.is_file():
        raise WorkflowError(f"{path}: graph {name!r} names {file}, which does not exist")
    return Workflow(name, path, _variable(source, variable, named_in=path))


def _variable(path: Path, name: str, named_in: Path | None = None) -> Any:
    """The graph in a variable, or made by a function without arguments."""
    module = load_module(path)
    where = f"{path}"
    if named_in is not None:
        where += f" (named in {named_in}{_line_with(named_in, f':{name}')})"
    if not hasattr(module, name):
        graphs = [k for k, v in vars(module).items() if isinstance(v, Pregel | StateGraph)]
        found = f"its graphs are: {', '.join(graphs)}" if graphs else "it has no graph"
        raise WorkflowError(f"{where} has no variable {name!r}; {found}")
    value = getattr(module, name)
    if isinstance(value, StateGraph):
        try:
            return as_compiled(value)
        except GraphError as error:
            raise WorkflowError(f"{path}{_line_with(path, f'{name} = ')}: {error}") from error
    if isinstance(value, Pregel) or not callable(value):
        return value
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError as error:
        raise WorkflowError(f"{where}: {name} is no graph, and makes none: {error}") from error
    needed = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(needed) > 1:
        raise WorkflowError(f"{where}: {name} needs arguments {needed}; it may take a config only")
    try:
        return value({}) if needed else value()
    except (Exception, SystemExit) as error:
        raise WorkflowError(_import_problem(path, error)) from error


def _line_with(path: Path, text: str) -> str:
    """`, line N` of the first line of a file that has a text; empty where none has."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((f", line {n}" for n, line in enumerate(lines, 1) if text in line), "")


def _import_problem(path: Path, error: BaseException) -> str:
    """File, line and cause of an exception that the user's file raised."""
    if isinstance(error, SyntaxError):
        return f"{error.filename or path}, line {error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    line = f", line {own[-1].lineno}" if own else ""
    text = f"{path}{line}: {type(error).__name__}: {error}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0].replace("_", "-")
        text += f" (try: pip install {package})"
    return text
