"""Every setting: what is no value of it is refused with its name, the value and what would be."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from marft_graph.config import NodeSettings, TrainConfig, read_yaml
from marft_graph.errors import ConfigError

OF_OTHER_TYPES: dict[Any, list[Any]] = {
    int: ["x", "3", 1.5, True, [1], {}, float("nan"), b"1"],
    float: ["x", True, [1.0], {}, float("nan"), float("inf"), "nan", "-inf", "1e999", 10**400, 1j],
    bool: [1, 0, "yes", "true", [], {}],
    str: [3, 1.5, True, ["a"], {"a": 1}, b"a"],
    tuple: [3, [1], ["a", 1], {"a": 1}, {"a"}, [["a"]], b"a"],
    Literal: ["other", "", 3, True, ["token"], {}],
    Mapping: [3, "x", ["a"], {"a": 3}, {"a": "lora_rank"}, {"a": {"lora_rnk": 1}}],
}


def kind_of(hint: Any) -> tuple[Any, bool]:
    """A key of `OF_OTHER_TYPES`, and whether None is a value too."""
    if typing.get_origin(hint) is types.UnionType:
        (inner,) = (arg for arg in typing.get_args(hint) if arg is not types.NoneType)
        return kind_of(inner)[0], True
    return typing.get_origin(hint) or hint, False


def cases(*, are_wrong: bool) -> Iterator[Any]:
    for settings in (TrainConfig, NodeSettings):
        hints = typing.get_type_hints(settings)
        for spec in dataclasses.fields(settings):
            kind, is_optional = kind_of(hints[spec.name])
            values = (wrong if are_wrong else right)(spec, kind, is_optional)
            for value in values:
                yield pytest.param(
                    settings, spec.name, value, id=f"{settings.__name__}-{spec.name}-{value!r:.20}"
                )


def wrong(spec: Any, kind: Any, is_optional: bool) -> Iterator[Any]:
    yield from OF_OTHER_TYPES[kind]
    if not is_optional:
        yield None
    low, high, above = (spec.metadata[key] for key in ("at_least", "at_most", "above"))
    if low is not None:
        yield low - (1 if kind is int else 1e-9)
        yield -(10**400) if kind is int else -1e308
    if above is not None:
        yield above
        yield above - 1e-9
    if high is not None:
        yield high + (1 if kind is int else 1e-6 * high)
        yield 10**400 if kind is int else 1e308


def right(spec: Any, kind: Any, is_optional: bool) -> Iterator[Any]:
    if is_optional:
        yield None
    for bound in ("at_least", "at_most"):
        if spec.metadata[bound] is not None:
            yield spec.metadata[bound]
    if kind is bool:
        yield from (True, False)
    if kind is tuple and spec.name not in ("fault_rewards", "trackers"):  # these hold no names
        yield from ("one", ["one", "two"], ())


@pytest.mark.parametrize(("settings", "name", "value"), [*cases(are_wrong=True)])
def test_what_is_no_value_of_a_setting_is_refused_by_name(
    settings: Any, name: str, value: Any
) -> None:
    with pytest.raises(ConfigError) as refused:
        settings(**{name: value})
    text = str(refused.value)
    assert text.startswith(name), text
    assert "must be" in text or "unknown setting" in text, text


@pytest.mark.parametrize(("settings", "name", "value"), [*cases(are_wrong=False)])
def test_bounds_and_what_else_a_setting_may_be_are_accepted(
    settings: Any, name: str, value: Any
) -> None:
    given = getattr(settings(**{name: value}), name)
    assert given == (
        (value,)
        if isinstance(value, str)
        else tuple(value or ())
        if isinstance(value, list | tuple)
        else value
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clip_ratio": 0}, "clip_ratio is 0; it must be above 0"),
        ({"lam": 1.5}, r"lam is 1\.5; it must be between 0 and 1"),
        ({"recovery_rate": 2}, "recovery_rate is 2; it must be above 0, at most 1"),
        ({"level": "tokens"}, "level is 'tokens'; it must be one of token, action"),
        ({"episode_timeout": float("inf")}, "episode_timeout is inf; it must be a finite number"),
        ({"learnin_rate": 1}, "unknown setting 'learnin_rate'; did you mean learning_rate"),
        ({3: 1}, "unknown setting 3"),
        ({"fault_rewards": ["ValueError"]}, "fault_rewards has 'ValueError'; each entry is"),
        ({"fault_rewards": ["ValueError=inf"]}, "fault_rewards has 'ValueError=inf'"),
        ({"fault_rewards": ["no name=1"]}, "fault_rewards has 'no name=1'"),
        ({"per_node": {"a": {"lora_rank": 0}}}, "per_node: a: lora_rank is 0; it must be"),
    ],
)
def test_the_message_has_name_value_and_what_is_accepted(
    values: dict[Any, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_mapping(values)


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    assert TrainConfig(learning_rate="1e-4").learning_rate == 1e-4  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"a: [", b"- 1\n- 2\n", b"text", b"1: 2", b"a: 2001-99-99", b"!!python/none x"],
)
def test_a_file_that_holds_no_settings_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        TrainConfig.load(path)
    with pytest.raises(ConfigError, match="cannot read settings from"):
        read_yaml(tmp_path)
    path.write_text(yaml.safe_dump(TrainConfig(base_model="m").to_dict()))
    assert TrainConfig.load(path) == TrainConfig(base_model="m")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"group_size": 1, "advantage": "group"}, "nothing to be compared with"),
        ({"group_size": 1, "filter_rounds": 2}, "every example would be left out"),
        ({"iterations": 5, "critic_warmup": 5}, "no adapter would ever be trained"),
        ({"fault_rewards": ["ValueError=1e13"]}, "fault_rewards has 'ValueError=1e13'"),
    ],
)
def test_settings_that_let_nothing_be_learnt_are_refused(
    settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainConfig(base_model="m", **settings)
