"""What MkDocs is told beyond its settings: the settings page, and links that leave the docs.

MkDocs calls `on_page_markdown` for each page (see `hooks` in mkdocs.yml).
"""

from __future__ import annotations

import dataclasses
import inspect
import posixpath
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from marft_graph.cli.settings import facts
from marft_graph.config import NodeSettings, TrainConfig

SETTINGS_MARK = "<!-- every setting -->"
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^):#\s]+)(?:#[^)\s]*)?\)")
_WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """A page's Markdown as the site shows it."""
    here = posixpath.dirname(page.file.src_uri)
    shown = _LINK.sub(lambda link: _on_site(link, here), markdown)
    return shown.replace(SETTINGS_MARK, "\n".join(_settings())) if SETTINGS_MARK in shown else shown


def _on_site(link: re.Match[str], here: str) -> str:
    """A link; where it leads to a file outside the docs, the name of that file instead."""
    text, target = link.groups()
    path = posixpath.normpath(posixpath.join(here, target))
    if not path.startswith("../"):
        return link[0]
    path = path.removeprefix("../")
    return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}` in the repository)"


def _settings() -> Iterator[str]:
    """The settings page, from the fields of the classes of settings."""
    section_of = _sections(TrainConfig)
    section = ""
    for spec in dataclasses.fields(TrainConfig):
        if section_of.get(spec.name, section) != section:
            section = section_of[spec.name]
            yield f"## {section}\n"
        yield from _setting(spec, TrainConfig, f"### `{spec.name}`")
    yield "## Of single nodes\n"
    yield "Under `per_node`, by node. What is not given is as the run says.\n"
    for spec in dataclasses.fields(NodeSettings):
        yield from _setting(spec, NodeSettings, f"### `{spec.name}` {{: #node-{spec.name} }}")


def _setting(spec: dataclasses.Field[Any], of: type[Any], heading: str) -> Iterator[str]:
    hint = typing.get_type_hints(of)[spec.name]
    said = spec.metadata["help"]
    about = "; ".join([_kind(hint), *facts(spec, hint)])
    yield f"{heading}\n\n{said[0].upper()}{said[1:]}.<br>\n*{about}*\n"


def _sections(of: type[Any]) -> dict[str, str]:
    """The comment line that each first field of a group stands under."""
    found, section = {}, ""
    for line in inspect.getsource(of).splitlines():
        if comment := re.fullmatch(r"    # (\w+)", line):
            section = comment[1]
        elif section and (field := re.match(r"    (\w+): ", line)):
            found[field[1]] = section
    return found


def _kind(hint: Any) -> str:
    """The type of a setting in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in args)
    if origin is tuple:
        return "list of names"
    if origin is Mapping:
        return "mapping of nodes to their settings"
    if origin in (types.UnionType, typing.Union):
        inner = next(arg for arg in args if arg is not type(None))
        return f"{_kind(inner)}, or none"
    return _WORDS[hint]
