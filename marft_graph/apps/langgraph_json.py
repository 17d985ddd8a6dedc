"""`langgraph.json`, read as `langgraph dev` reads it: dependencies, environment, entries."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dotenv import dotenv_values

from marft_graph.apps.importing import import_by_name, load_module
from marft_graph.errors import WorkflowError

logger = logging.getLogger(__name__)

_JAVASCRIPT = (".js", ".mjs", ".cjs", ".ts", ".mts", ".cts")


@dataclass(frozen=True, slots=True)
class LangGraphJson:
    """A parsed `langgraph.json`."""

    path: Path
    graphs: Mapping[str, str]
    """Name of a graph to its entry: `./file.py:variable` or `package.module:variable`."""
    dependencies: tuple[str, ...]
    """Folders, relative to the file's, and names of packages that are installed by others."""
    env: str | Mapping[str, str]
    """A .env file, relative to the file's folder, or variables and their values."""

    def entry_of(self, name: str) -> tuple[str, str, str]:
        """Name, place and variable of one graph; the only one where no name is given.

        Raises:
            WorkflowError: there is no such graph, or several and none is named.
        """
        if name and name not in self.graphs:
            raise WorkflowError(
                f"{self.path} has no graph {name!r}; it has {', '.join(self.graphs)}"
            )
        if not name and len(self.graphs) != 1:
            raise WorkflowError(
                f"{self.path} has {len(self.graphs)} graphs; say which: "
                + ", ".join(f"{self.path}:{entry}" for entry in self.graphs)
            )
        name = name or next(iter(self.graphs))
        place, _, variable = self.graphs[name].rpartition(":")
        if not place or not variable:
            raise WorkflowError(
                f"{self.path}: graph {name!r} is {self.graphs[name]!r}; it must be "
                "file.py:variable or package.module:variable"
            )
        if place.endswith(_JAVASCRIPT):
            raise WorkflowError(
                f"{self.path}: graph {name!r} is {place}, written in JavaScript; only graphs in "
                "Python can be trained"
            )
        return name, place, variable

    def module_of(self, name: str, place: str) -> ModuleType:
        """Import the module that holds a graph.

        Raises:
            WorkflowError: it does not exist, or its code raised.
        """
        roots = self.roots()
        if "/" not in place and not place.endswith(".py"):
            return import_by_name(place, roots, self.path)
        source = self.path.parent / place
        if not source.is_file():
            raise WorkflowError(f"{self.path}: graph {name!r} names {place}, which does not exist")
        return load_module(source, roots)

    def roots(self) -> list[Path]:
        """Folders whose packages the graphs may import, the `src` folder of each included.

        `langgraph up` and deployments install a dependency that has a pyproject.toml; its `src`
        folder stands for that here.
        """
        folder = self.path.parent.resolve()
        roots = [folder]
        for dependency in self.dependencies:
            place = folder / dependency
            if place.is_dir():
                roots.append(place.resolve())
            elif dependency.startswith("."):
                logger.warning("%s: its dependency %s is no folder", self.path, dependency)
        with_sources = [place for root in roots for place in (root, root / "src")]
        return [place for place in dict.fromkeys(with_sources) if place.is_dir()]

    def set_environment(self) -> None:
        """Set the variables of `env`, also where the process has others, as `langgraph dev` does.

        Raises:
            WorkflowError: the file cannot be read.
        """
        values: Mapping[str, str | None] = {}
        if isinstance(self.env, Mapping):
            values = self.env
        elif self.env:
            file = self.path.parent / self.env
            if not file.is_file():
                logger.warning("%s names the env file %s, which does not exist", self.path, file)
                return
            try:
                values = dotenv_values(file)
            except (OSError, UnicodeDecodeError) as error:
                raise WorkflowError(f"{file} cannot be read: {error}") from error
        os.environ.update({key: value for key, value in values.items() if value is not None})


def read_langgraph_json(path: Path) -> LangGraphJson:
    """Read the file; nothing is imported.

    Raises:
        WorkflowError: it is no such file; the message says what it must hold.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        entries = {
            key: str(value if isinstance(value, str) else value["path"])
            for key, value in content["graphs"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WorkflowError(
            f'{path} must hold {{"graphs": {{"name": "./file.py:variable"}}}}: {error!r}'
        ) from error
    return LangGraphJson(
        path=path,
        graphs=entries,
        dependencies=_dependencies(path, content.get("dependencies")),
        env=_env(path, content.get("env")),
    )


def _dependencies(path: Path, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise WorkflowError(f'{path}: dependencies must be a list such as ["."], not {value!r:.60}')
    return tuple(value)


def _env(path: Path, value: Any) -> str | dict[str, str]:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return {str(key): str(each) for key, each in value.items() if each is not None}
    raise WorkflowError(
        f"{path}: env must be the path of a .env file or variables with their values, not a "
        f"{type(value).__name__}"
    )
