"""Arbitrary input to every reader: round trips hold, and only MarftError reaches a user.

A few inputs each by default, ten thousand in the slow tier, about twenty minutes on one core.

Hypothesis alone: atheris 3.0, guided by coverage, was tried on what only reads text (tool calls,
names, settings). In 365,000 runs its coverage stopped growing, and it found nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from safetensors.torch import save_file
from torch import zeros
from transformers import AutoTokenizer

from marft_graph.config import NodeSettings, TrainConfig, read_yaml
from marft_graph.deploy.manifest import FORMAT, Manifest, read_manifest, sealed
from marft_graph.episode import Call, Episode
from marft_graph.errors import CheckpointError, ConfigError, ExportError, ModelError
from marft_graph.graph.flex_mg import FlexMG
from marft_graph.names import adapter_name, agent_of_adapter
from marft_graph.policy.adapters import Policy
from marft_graph.policy.chat import TokenizerCodec
from marft_graph.policy.tool_formats import HERMES, LLAMA, MISTRAL, XML
from marft_graph.run.checkpoint import verify, write_folder_atomically
from marft_graph.run.state import RunState, read_state
from marft_graph.run.tracking import read_metrics
from marft_graph.run.trajectories import read_traces, write_traces
from tests.support import make_agents

FEW = 40
SIZES = [FEW, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
in_two_sizes = pytest.mark.parametrize("count", SIZES)
SURROGATES = st.text(alphabet=st.characters())  # lone surrogates included
TEXT = st.text()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def fuzz(count: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Call `check` with so many values: always the same few, or many new ones."""
    limits = settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=count == FEW,
        suppress_health_check=list(HealthCheck),
    )
    limits(given(strategy)(check))()


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with some of them changed, cut off or inserted."""
    at = st.integers(0, len(content))
    return st.one_of(
        at.map(lambda end: content[:end]),
        st.tuples(at, st.binary(min_size=1, max_size=8)).map(
            lambda pair: content[: pair[0]] + pair[1] + content[pair[0] + len(pair[1]) :]
        ),
        st.tuples(at, st.binary(max_size=8)).map(
            lambda pair: content[: pair[0]] + pair[1] + content[pair[0] :]
        ),
        st.lists(st.integers(0, 8 * len(content) - 1), min_size=1, max_size=4).map(
            lambda bits: _flipped(content, bits)
        ),
        st.binary(max_size=64),
    )


def _flipped(content: bytes, bits: list[int]) -> bytes:
    changed = bytearray(content)
    for bit in bits:
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


# Settings


FIELDS = sorted(TrainConfig.__dataclass_fields__)
NODE_FIELDS = sorted(NodeSettings.__dataclass_fields__)
PLAUSIBLE = st.one_of(
    JSON,
    st.integers(-1, 3),
    st.floats(-1, 2),
    st.sampled_from(
        ["1e-4", "inf", "nan", "none", "token", "gae", "sum", "float32", "ValueError=1"]
    ),
    st.dictionaries(TEXT, st.dictionaries(st.sampled_from(NODE_FIELDS), JSON, max_size=3)),
)


@in_two_sizes
def test_any_settings_are_refused_by_name_or_come_back_as_they_were(count: int) -> None:
    def check(values: dict[str, Any]) -> None:
        try:
            config = TrainConfig.from_mapping({"base_model": "x", **values})
        except ConfigError as error:
            assert any(repr(name)[1:-1] in str(error) for name in values), (values, error)
            return
        plain = config.to_dict()
        assert TrainConfig.from_mapping(plain) == config
        given_ = {name: plain[name] for name in ("base_model", *values)}  # YAML is slow
        assert TrainConfig.from_mapping(yaml.safe_load(yaml.safe_dump(given_))) == config

    names = st.sampled_from(FIELDS) | TEXT
    fuzz(count, st.dictionaries(names, PLAUSIBLE, min_size=1, max_size=4), check)


@in_two_sizes
def test_any_file_of_settings_is_a_mapping_or_refused(count: int, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    valid = yaml.safe_dump(TrainConfig(base_model="x").to_dict()).encode()

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            values = read_yaml(path)
        except ConfigError as error:
            assert str(path) in str(error)
            return
        assert isinstance(values, dict)
        try:
            TrainConfig.from_mapping({"base_model": "x", **values})
        except ConfigError as error:
            assert str(error)

    fuzz(count, damaged(valid) | TEXT.map(lambda text: text.encode()), check)


# Episodes


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
IDS = st.lists(st.integers(0, 2**31), max_size=5).map(tuple)


@st.composite
def calls(draw: st.DrawFn, index: int) -> Call:
    completion = draw(IDS)
    return Call(
        agent=draw(TEXT),
        node=draw(TEXT),
        index=index,
        parents=tuple(sorted(draw(st.sets(st.integers(0, index - 1))) if index else ())),
        prompt_ids=draw(IDS),
        completion_ids=completion,
        logprobs=tuple(draw(FLOATS) for _ in completion),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        adapter_version=draw(st.integers(0, 2**31)),
        temperature=draw(FLOATS),
        reward=draw(FLOATS),
        messages=tuple(
            draw(st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), max_size=3))
        ),
        task_id=draw(TEXT),
        step=draw(st.integers(0, 2**31)),
        seed=draw(st.integers(0, 2**63 - 1)),
        grammar=draw(TEXT),
    )


@st.composite
def episodes(draw: st.DrawFn) -> Episode:
    return Episode(
        example=draw(st.dictionaries(SURROGATES, SURROGATES | st.integers(), max_size=3)),
        calls=tuple(draw(calls(index)) for index in range(draw(st.integers(0, 2)))),
        outcome_reward=draw(FLOATS),
        node_rewards=draw(st.dictionaries(TEXT, FLOATS, max_size=2)),
        reward_parts=draw(st.dictionaries(TEXT, FLOATS, max_size=2)),
        status=draw(TEXT),
        error=draw(TEXT),
        seed=draw(st.integers(0, 2**63 - 1)),
        example_index=draw(st.integers(0, 2**31)),
    )


@in_two_sizes
def test_any_episodes_come_back_from_their_file(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # ten thousand of them take minutes

    def check(written: list[Episode]) -> None:
        path = write_traces(tmp_path / "t.parquet", written, 1, "train")
        assert read_traces(path) == written

    fuzz(count, st.lists(episodes(), max_size=2), check)


@in_two_sizes
def test_any_damage_of_a_file_of_episodes_is_named(count: int, tmp_path: Path) -> None:
    call = Call("a", "a", 0, (), (1,), (2,), (-0.5,), "stop", 0)
    path = write_traces(tmp_path / "t.parquet", [Episode({"q": "x"}, (call,))], 1, "train")
    content = path.read_bytes()

    def check(changed: bytes) -> None:
        path.write_bytes(changed)
        try:
            read_traces(path)
        except CheckpointError as error:
            assert str(path) in str(error)

    fuzz(count, damaged(content), check)


@in_two_sizes
def test_any_values_in_a_file_of_episodes_are_episodes_or_refused(
    count: int, tmp_path: Path
) -> None:
    call = Call("a", "a", 0, (), (1,), (2,), (-0.5,), "stop", 0)
    path = write_traces(tmp_path / "t.parquet", [Episode({"q": "x"}, (call,))], 1, "train")
    table = pq.read_table(path, partitioning=None)
    names = st.sampled_from(table.column_names)

    def check(change: tuple[str, str | int | None]) -> None:
        name, value = change
        at = table.column_names.index(name)
        pq.write_table(table.set_column(at, name, pa.array([value])), path)
        try:
            read_traces(path)
        except CheckpointError as error:
            assert str(path) in str(error)

    values = TEXT | st.integers(-(2**31), 2**31) | st.none() | JSON.map(json.dumps)
    fuzz(count, st.tuples(names, values), check)


# Checkpoints and run folders


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    def fill(folder: Path) -> None:
        (folder / "adapters").mkdir()
        save_file({"weights": zeros(4)}, folder / "adapters" / "weights.safetensors")
        (folder / "state.json").write_text('{"iteration": 3}', encoding="utf-8")

    return write_folder_atomically(tmp_path / "checkpoints" / "step_3", fill)


@in_two_sizes
def test_any_damage_of_a_checkpoint_is_found(count: int, checkpoint: Path) -> None:
    names = ["manifest.json", "state.json", "adapters/weights.safetensors"]
    contents = {name: (checkpoint / name).read_bytes() for name in names}

    def check(change: tuple[str, bytes]) -> None:
        name, content = change
        assume(content != contents[name])
        (checkpoint / name).write_bytes(content)
        try:
            with pytest.raises(CheckpointError):
                verify(checkpoint)
        finally:
            (checkpoint / name).write_bytes(contents[name])

    strategy = st.sampled_from(names).flatmap(
        lambda name: st.tuples(st.just(name), damaged(contents[name]))
    )
    fuzz(count, strategy, check)
    verify(checkpoint)


@in_two_sizes
def test_any_manifest_of_a_checkpoint_is_checked(count: int, checkpoint: Path) -> None:
    def check(manifest: Any) -> None:
        (checkpoint / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        with pytest.raises(CheckpointError):
            verify(checkpoint)

    entries = st.dictionaries(st.sampled_from(["size", "sha256"]) | TEXT, JSON, max_size=3)
    names = st.sampled_from(["../../etc/passwd", "/", "", "state.json", "a\0b"]) | TEXT
    fuzz(count, JSON | st.fixed_dictionaries({"files": st.dictionaries(names, entries)}), check)


@in_two_sizes
def test_any_state_is_read_or_refused(count: int, tmp_path: Path) -> None:
    def check(state: Any) -> None:
        (tmp_path / "state.json").write_text(json.dumps(state), encoding="utf-8")
        try:
            found = read_state(tmp_path)
        except CheckpointError as error:
            assert "state.json" in str(error)
            return
        assert found.iteration >= 0

    fields = st.sampled_from(sorted(RunState.__dataclass_fields__))
    fuzz(count, JSON | st.dictionaries(fields, JSON | st.integers(0, 9), max_size=4), check)


@in_two_sizes
def test_any_log_of_metrics_is_read_or_refused_by_line(count: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    valid = b'{"iteration": 1, "x": null}\n{"iteration": 2}\n'

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            rows = read_metrics(tmp_path)
        except CheckpointError as error:
            assert re.search(r"line \d+ of", str(error))
            return
        assert all(isinstance(row["iteration"], int) for row in rows)

    fuzz(count, damaged(valid), check)


@in_two_sizes
def test_any_manifest_of_an_export_is_refused(count: int, tmp_path: Path) -> None:
    def check(manifest: Any) -> None:
        (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        with pytest.raises(ExportError):
            read_manifest(tmp_path)

    fields = [*Manifest.__dataclass_fields__, "manifest_sha256"]
    fuzz(count, JSON | st.fixed_dictionaries(dict.fromkeys(fields, JSON)), check)


@in_two_sizes
def test_any_damage_of_an_exports_manifest_is_found(count: int, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    fields: dict[str, Any] = {key: {} for key in Manifest.__dataclass_fields__}
    path.write_bytes(sealed(fields | {"format": FORMAT, "created": "2026-01-01"}))
    content = path.read_bytes()
    read_manifest(tmp_path)

    def check(changed: bytes) -> None:
        assume(changed != content)
        path.write_bytes(changed)
        with pytest.raises(ExportError):
            read_manifest(tmp_path)

    fuzz(count, damaged(content), check)


@in_two_sizes
def test_any_damage_of_adapter_weights_is_named(
    count: int, tiny_model: Path, tmp_path: Path
) -> None:
    agents = make_agents(["actor"], tiny_model, lora_rank=1)
    policy = Policy.load(str(tiny_model), agents, device="cpu")
    policy.save_adapter("actor", tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")

    def check(changed: bytes) -> None:
        path.write_bytes(changed + content[header:])
        try:
            policy.load_adapter("actor", tmp_path)
        except ModelError as error:
            assert str(path) in str(error)

    fuzz(count, damaged(content[:header]), check)


@in_two_sizes
def test_any_graph_is_read_or_refused(count: int) -> None:
    def check(value: Any) -> None:
        # What `check_same_run` and `export_run` turn into their own errors.
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            FlexMG.from_dict(value)

    fuzz(count, JSON | st.dictionaries(st.sampled_from(["nodes", "edges", "agents"]), JSON), check)


# Chat


@pytest.fixture(scope="module")
def codec(tiny_model: Path) -> TokenizerCodec:
    return TokenizerCodec(AutoTokenizer.from_pretrained(tiny_model), 256)


SAID = st.lists(
    st.sampled_from(["<|end|>", "<|system|>", "<|user|>", "<|", "|>", "\ue000", "\ue001", "0"])
    | SURROGATES,
    max_size=6,
).map("".join)


def special_ids(codec: TokenizerCodec, ids: tuple[int, ...]) -> list[int]:
    special = set(codec._tokenizer.added_tokens_decoder)
    return [token for token in ids if token in special]


@in_two_sizes
def test_no_text_of_a_message_or_tool_becomes_a_special_token(
    count: int, codec: TokenizerCodec
) -> None:
    def conversation(say: Callable[[str], str], parts: list[str]) -> tuple[int, ...]:
        one, two, three, four, five = (say(part) for part in parts)
        call = {"name": one, "args": {two: three}, "id": "call_1"}
        tools = [{"type": "function", "function": {"name": five, "parameters": {four: one}}}]
        return codec.render(
            [
                SystemMessage(one),
                HumanMessage([{"type": "text", "text": two}, {"type": "text", "text": three}]),
                AIMessage(four, tool_calls=[call]),
                ToolMessage(five, tool_call_id=three, name=four),
                HumanMessage(two),
            ],
            tools,
        )

    def check(parts: list[str]) -> None:
        ids = conversation(lambda text: text, parts)
        assert special_ids(codec, ids) == special_ids(codec, conversation(lambda _: "x", parts))
        clean = re.sub("[\ud800-\udfff]", "\ufffd", "".join(parts[1:3]))
        text = codec._tokenizer.decode(ids, skip_special_tokens=False)
        # Tokenizers may have a normal form of their own: NFC writes some ideographs as others.
        normalizer = codec._tokenizer.backend_tokenizer.normalizer
        assert (clean if normalizer is None else normalizer.normalize_str(clean)) in text

    fuzz(count, st.lists(SAID, min_size=5, max_size=5), check)


@in_two_sizes
def test_any_completion_is_a_message(count: int, codec: TokenizerCodec) -> None:
    size = len(codec._tokenizer)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]

    def check(given_: tuple[list[int], list[str], bool]) -> None:
        ids, stop, has_tools = given_
        message = codec.parse(ids, stop=stop, tools=tools if has_tools else ())
        assert isinstance(message.content, str)
        assert isinstance(codec.render([HumanMessage("a"), message, HumanMessage("b")]), tuple)

    ids = st.lists(st.integers(0, size - 1), max_size=40)
    fuzz(count, st.tuples(ids, st.lists(st.text(min_size=1), max_size=2), st.booleans()), check)


# Tool calls


FORMATS = {"hermes": HERMES, "xml": XML, "llama": LLAMA, "mistral": MISTRAL}
PIECES = st.lists(
    st.sampled_from(
        [
            *(
                "<tool_call>",
                "</tool_call>",
                "[TOOL_CALLS]",
                "<|python_tag|>",
                "[ARGS]",
                "[CALL_ID]",
            ),
            *("<function=", "<function=add>", "</function>", "<parameter=a>", "</parameter>", ">"),
            *('{"name": "add", "arguments": {"a": 1}}', '{"name":', "[", "]", "{", "}", '"', "\\"),
            *("null", "NaN", "1e999", "add", "\n", "<think>", "</think>"),
        ]
    )
    | SURROGATES,
    max_size=10,
).map("".join)
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


@in_two_sizes
@pytest.mark.parametrize("name", FORMATS)
def test_any_text_is_scanned_for_tool_calls(count: int, name: str) -> None:
    def check(text: str) -> None:
        content, found = FORMATS[name].scan(text, [ADD])
        assert isinstance(content, str)
        for call in found:
            assert isinstance(call.text, str)

    fuzz(count, PIECES, check)


@in_two_sizes
def test_any_arguments_of_a_tool_come_back(count: int) -> None:
    def check(arguments: dict[str, Any]) -> None:
        written = json.dumps({"name": "add", "arguments": arguments}, ensure_ascii=False)
        content, (call,) = HERMES.scan(f"so: <tool_call>\n{written}\n</tool_call>", [ADD])
        assert content.strip() == "so:"
        assert (call.name, call.arguments) == ("add", arguments)

    plain = JSON.filter(
        lambda value: "NaN" not in json.dumps(value) and "tool_call" not in str(value)
    )
    finite = plain.filter(lambda value: "Infinity" not in json.dumps(value))
    fuzz(count, st.dictionaries(TEXT, finite, max_size=4), check)


# Names


@in_two_sizes
def test_any_name_is_a_file_name_and_comes_back(count: int) -> None:
    seen: dict[str, str] = {}

    def check(path: str) -> None:
        name = adapter_name(path)
        assert re.fullmatch(r"[A-Za-z0-9_-]*", name)
        assert "lora_" not in name
        assert agent_of_adapter(name) == path
        assert seen.setdefault(name, path) == path

    pieces = st.sampled_from(["lora_", "lora-5F", "-5F", "../", "/", "\0", "node-", "-", "a"])
    fuzz(count, st.lists(pieces | SURROGATES, max_size=5).map("".join), check)


def assert_text(value: object) -> None:
    assert isinstance(value, str)


@in_two_sizes
def test_any_text_can_be_read_as_an_adapter_name(count: int) -> None:
    fuzz(count, SURROGATES, lambda name: assert_text(agent_of_adapter(name)))
