"""Which base model it is: a digest of every file that decides what the model computes.

A base is known by a path or a hub id, and what stands there can change: a folder is trained on, a
repository moves to another commit. Adapters fit the weights that they were trained on only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from marft_graph.errors import ModelError

# What transformers loads of a base. A folder of the hub's cache may get other files at any time
# (vLLM and git fetch all of a repository), which change nothing.
_DESCRIPTIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"

_WHOLE = 256 * 2**20
"""Bytes up to which all of a file is read: half a second at 500 MB/s."""
_HEAD = 2**20
_PAGE = 4096
_PAGES = 1024


def fingerprint(base_model: str) -> dict[str, str]:
    """File -> digest, for a folder or for what the cache has of a hub id; empty if it has nothing.

    Files of more than 256 MiB are sampled: size, the first MiB (which names tensors and shapes) and
    1024 pages of 4 KiB spread evenly. That takes milliseconds where a sha256 of a large model takes
    minutes, and any further training of it changes nearly every page. A change of a few weights
    between the pages is not seen.

    Raises:
        ModelError: a file cannot be read.
    """
    folder = base_folder(base_model)
    if folder is None:
        return {}
    try:
        names = [*_DESCRIPTIONS, *_weights(folder), *sorted(p.name for p in folder.glob("*.py"))]
        return {name: _digest(folder / name) for name in names if (folder / name).is_file()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"cannot read the files of base_model {base_model!r}: {error}") from error


def base_folder(base_model: str) -> Path | None:
    """The folder that a base is loaded from, in the cache for a hub id; None if it is not here."""
    path = Path(os.path.expanduser(base_model))
    if path.is_dir():
        return path
    try:
        cached = try_to_load_from_cache(base_model, "config.json")
    except HFValidationError:  # the path of a folder that is gone
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names of the files that differ between two fingerprints; none where one of them is empty.

    >>> differing({"config.json": "a", "model.safetensors": "b"}, {"config.json": "a"})
    ['model.safetensors']
    """
    if not before or not now:
        return []
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def _weights(folder: Path) -> list[str]:
    """The files of weights, as transformers chooses them."""
    if (folder / _WEIGHTS).is_file() or not (folder / _INDEX).is_file():
        return [_WEIGHTS]
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    return [_INDEX, *sorted(set(index["weight_map"].values()))]


def _digest(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as stream:
        if size <= _WHOLE:
            return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
        return f"sampled:{_sampled(stream, size)}"


def _sampled(stream: BinaryIO, size: int) -> str:
    digest = hashlib.sha256(size.to_bytes(8))
    digest.update(stream.read(_HEAD))
    for page in range(_PAGES):
        stream.seek(page * (size - _PAGE) // (_PAGES - 1))
        digest.update(stream.read(_PAGE))
    return digest.hexdigest()
