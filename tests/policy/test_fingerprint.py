"""Which base model it is: what counts, what does not, and what a large file costs."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from marft_graph.errors import ModelError
from marft_graph.policy import fingerprint as module
from marft_graph.policy.fingerprint import differing, fingerprint


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "base"))


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"]
)
def test_every_file_that_is_loaded_counts(base: Path, name: str) -> None:
    before = fingerprint(str(base))
    (base / name).write_bytes((base / name).read_bytes() + b" ")
    assert differing(before, fingerprint(str(base))) == [name]
    (base / name).unlink()
    assert differing(before, fingerprint(str(base))) == [name]


def test_a_single_bit_of_the_weights_counts(base: Path) -> None:
    before = fingerprint(str(base))
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert differing(before, fingerprint(str(base))) == ["model.safetensors"]


def test_what_is_not_loaded_and_where_it_stands_do_not_count(base: Path, tmp_path: Path) -> None:
    before = fingerprint(str(base))
    (base / "README.md").write_text("another model card")
    (base / "consolidated.safetensors").write_bytes(b"the same weights, for others")
    moved = base.rename(tmp_path / "elsewhere")
    assert fingerprint(str(moved)) == before


def test_the_parts_that_an_index_names_count(base: Path) -> None:
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    found = fingerprint(str(base))
    assert {"model.safetensors.index.json", "model-00001-of-00001.safetensors"} <= found.keys()
    (base / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="cannot read the files of base_model"):
        fingerprint(str(base))


def test_a_large_file_is_sampled_in_a_moment(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = base / "model.safetensors"
    size = 8 * 2**30
    with weights.open("wb") as stream:
        stream.truncate(size)  # a hole: takes no room on the disk
    started = time.perf_counter()
    before = fingerprint(str(base))
    assert time.perf_counter() - started < 2
    assert before["model.safetensors"].startswith("sampled:")
    page = 9_000_000  # more than there is between two pages
    for at in (0, size // 3, size - page):
        with weights.open("r+b") as stream:
            stream.seek(at)
            stream.write(b"x" * page)
        assert differing(before, fingerprint(str(base))) == ["model.safetensors"], at
        with weights.open("r+b") as stream:
            stream.seek(at)
            stream.write(bytes(page))
    assert fingerprint(str(base)) == before
    with weights.open("r+b") as stream:
        stream.truncate(size + 1)
    assert differing(before, fingerprint(str(base))) == ["model.safetensors"]


@pytest.mark.parametrize("name", ["no/such", "/no/such/folder", "not a name", "../x", ""])
def test_a_base_that_is_not_here_has_none(name: str) -> None:
    assert fingerprint(name) == {}
    assert differing({}, {"config.json": "a"}) == []


def test_a_hub_model_is_looked_up_in_the_cache(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cached(repository: str, name: str) -> str:
        assert (repository, name) == ("team/model", "config.json")
        return str(base / name)

    monkeypatch.setattr(module, "try_to_load_from_cache", cached)
    assert fingerprint("team/model") == fingerprint(str(base))
