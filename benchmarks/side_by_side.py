"""What the speed benchmarks share: things timed in turn, and figures with where they come from."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
BASE = ROOT / "workflows" / "tiny_base"
_PACKAGES = ("torch", "transformers", "peft", "langgraph", "langchain-core", "trl")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    options.add_argument("--rounds", type=int, default=5, help="times each thing is measured")
    options.add_argument("--json", type=Path, help="write the figures to this file")
    return options


def in_turn(
    works: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of each piece of work in every round; in a round one follows the other."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + warm_up):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(base: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as fast ours is: the median over rounds, each compared within itself."""
    return statistics.median(b / o for b, o in zip(base, ours, strict=True))


def machine() -> dict[str, Any]:
    """Where figures were measured, with what."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def publish(rows: Sequence[Mapping[str, Any]], path: Path | None) -> None:
    """Print figures as a Markdown table, and write them as JSON with the machine."""
    columns = list(rows[0])
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(_shown(row[column]) for column in columns)} |")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"machine": machine(), "figures": list(rows)}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


@contextmanager
def endless_base() -> Iterator[Path]:
    """The tiny base with an end-of-sequence token that it never writes: answers have full length.

    Its padding token takes that part; it never saw one where a token was to be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "base"
        shutil.copytree(BASE, copy)
        for name, key, value in (
            ("config.json", "eos_token_id", 257),
            ("generation_config.json", "eos_token_id", 257),
            ("tokenizer_config.json", "eos_token", _pad_token(copy)),
        ):
            settings = json.loads((copy / name).read_text(encoding="utf-8"))
            settings[key] = value
            (copy / name).write_text(json.dumps(settings), encoding="utf-8")
        yield copy


def _pad_token(folder: Path) -> str:
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return str(settings["pad_token"])
