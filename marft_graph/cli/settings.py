"""Command-line options made from the fields of `TrainConfig`.

Owns how a setting is spelled, parsed and explained on the command line. The settings themselves,
their ranges and their descriptions are `marft_graph.config`'s; values are checked there.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import click
import yaml

from marft_graph.config import TrainConfig, read_yaml

Command = Callable[..., Any]
_NONE = object()  # the user asked for None; an option that was not given is None itself


class SettingsCommand(click.Command):
    """A command whose help lists its own options first and the training settings after them."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the two lists."""
        settings = {spec.name for spec in dataclasses.fields(TrainConfig)}
        own: list[tuple[str, str]] = []
        shared: list[tuple[str, str]] = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                (shared if param.name in settings else own).append(record)
        with formatter.section("Options"):
            formatter.write_dl(own)
        with formatter.section("Settings (each is also a name in config.yaml)"):
            formatter.write_dl(shared)


def settings_options(command: Command) -> Command:
    """Give a command one option for each field of `TrainConfig`; what is not given stays None."""
    hints = typing.get_type_hints(TrainConfig)
    for spec in reversed(dataclasses.fields(TrainConfig)):
        command = _option(spec, hints[spec.name])(command)
    return command


def given_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among a command's options that the user gave."""
    names = {spec.name for spec in dataclasses.fields(TrainConfig)}
    return {
        name: None if value is _NONE else value
        for name, value in options.items()
        if name in names and value is not None and value != ()
    }


def merged_settings(
    *layers: Mapping[str, Any], config_file: Path | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Later layers win: the given ones in order, then the file, then the options given.

    Raises:
        ConfigError: the file cannot be read as settings.
    """
    merged: dict[str, Any] = {}
    file = {} if config_file is None else read_yaml(config_file)
    for layer in (*layers, file, given_settings(options)):
        for name, value in layer.items():
            if name == "per_node" and isinstance(value, Mapping):
                value = _merged_nodes(merged.get(name) or {}, value)
            merged[name] = value
    return merged


def _merged_nodes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`per_node` of two layers, setting by setting."""
    merged = dict(old)
    for node, own in new.items():
        both = isinstance(own, Mapping) and isinstance(merged.get(node), Mapping)
        merged[node] = {**merged[node], **own} if both else own
    return merged


def _option(spec: dataclasses.Field[Any], hint: Any) -> Callable[[Command], Command]:
    flag = "--" + spec.name.replace("_", "-")
    text = f"{spec.metadata['help']}  [{'; '.join(facts(spec, hint))}]"
    origin = typing.get_origin(hint)
    if hint is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", spec.name, default=None, help=text)
    if origin is tuple:
        return click.option(flag, spec.name, multiple=True, metavar="NAME", help=text)
    if origin is Mapping:
        return click.option(
            flag,
            spec.name,
            multiple=True,
            metavar="NODE.SETTING=VALUE",
            callback=_node_values,
            help=text,
        )
    if origin is Literal:
        choice = click.Choice(typing.get_args(hint))
        return click.option(flag, spec.name, type=choice, default=None, help=text)
    if hint == str | None:
        return click.option(flag, spec.name, default=None, metavar="TEXT", help=text)
    if origin is types.UnionType:
        parse, kind = (_number_or_none, "FLOAT")
        if hint == int | None:
            parse, kind = (_whole_number_or_none, "INTEGER")
        return click.option(
            flag, spec.name, type=parse, default=None, metavar=f"{kind}|none", help=text
        )
    return click.option(flag, spec.name, type=hint, default=None, help=text)


def _node_values(
    context: click.Context, param: click.Parameter, given: tuple[str, ...]
) -> dict[str, dict[str, Any]] | None:
    """`NODE.SETTING=VALUE` options as the mapping that `per_node` is; None where none was given."""
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        place, equals, value = text.partition("=")
        node, _, name = place.rpartition(".")
        if not equals or not node:
            raise click.BadParameter(
                f"{text!r} is not NODE.SETTING=VALUE, as in planner.lora_rank=8"
            )
        found.setdefault(node, {})[name] = yaml.safe_load(value)
    return found or None


def _number_or_none(text: str) -> object:
    """A number, or the mark that `given_settings` turns into None."""
    return _parsed(float, "a number", text)


def _whole_number_or_none(text: str) -> object:
    """A whole number, or the mark."""
    return _parsed(int, "a whole number", text)


def _parsed(kind: type[int] | type[float], words: str, text: str) -> object:
    if text.lower() == "none":
        return _NONE
    try:
        return kind(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither {words} nor the word none") from None


def facts(spec: dataclasses.Field[Any], hint: Any) -> Iterator[str]:
    """Unit, range, and default of a setting, as the help prints them."""
    if spec.metadata["unit"]:
        yield spec.metadata["unit"]
    low, high, above = (spec.metadata[key] for key in ("at_least", "at_most", "above"))
    if above is not None:
        yield f"above {above}"
    if low is not None and high is not None:
        yield f"{low} to {high}"
    elif low is not None:
        yield f"at least {low}"
    if typing.get_origin(hint) in (tuple, Mapping):
        yield "repeatable"
    yield f"default {_shown(() if spec.default is dataclasses.MISSING else spec.default)}"


def _shown(value: Any) -> str:
    if value is None or value in ((), ""):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(value) if isinstance(value, tuple) else f"{value}"
