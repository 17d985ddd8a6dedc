"""Adapters out of a run: one PEFT folder per node and a manifest that ties them to graph and base.

An export folder is all that production needs beside the base model. Nothing here samples or trains.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marft_graph.agents import base_model_of
from marft_graph.config import TrainConfig, read_yaml
from marft_graph.engine.server import served_rank
from marft_graph.errors import CheckpointError, ExportError
from marft_graph.graph.flex_mg import FlexMG
from marft_graph.run.checkpoint import latest_checkpoint, write_folder_atomically

FORMAT = 2
MANIFEST = "manifest.json"
_VERSIONED = ("marft-graph", "torch", "transformers", "peft", "langgraph", "langchain-core")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an export folder says of itself (`manifest.json`)."""

    dtype: str
    graph_hash: str
    nodes: Mapping[str, str]
    """Agent path -> name of its adapter; several may share one."""
    adapters: Mapping[str, Mapping[str, Any]]
    """Name -> `path` of the adapter's folder, relative to the export folder, and `base_model`."""
    max_new_tokens: int
    metrics: Mapping[str, Any]
    sha256: Mapping[str, str]
    """Digest of every other file in the folder, by relative path."""
    constrain_output: bool = False
    """Whether structured output was constrained to its schema in training."""
    special_tokens_in_text: bool = False
    """Whether special tokens in messages' text were encoded as such in training."""

    def folders(self, folder: Path, base_model: str | None = None) -> dict[str, tuple[str, Path]]:
        """Base model and folder of each adapter.

        Args:
            folder: the export folder.
            base_model: where the base is now, if not where the manifest says.

        Raises:
            ExportError: adapters stand on several bases, which one `base_model` cannot replace.
        """
        bases = {str(own["base_model"]) for own in self.adapters.values()}
        if base_model is not None and len(bases) > 1:
            raise ExportError(
                f"the adapters in {folder} stand on {len(bases)} base models "
                f"({', '.join(sorted(bases))}); base_model can replace only a single one"
            )
        return {
            name: (base_model or str(own["base_model"]), folder / own["path"])
            for name, own in self.adapters.items()
        }


def export_run(run_dir: str | Path, out_dir: str | Path) -> Path:
    """Write the adapters of a run's newest intact checkpoint to `out_dir`.

    Raises:
        ExportError: `run_dir` is no run folder, or `out_dir` exists and is not empty.
    """
    run = Path(run_dir)
    if not (run / "config.yaml").is_file() or not (run / "graph.json").is_file():
        raise ExportError(f"{run} is no run folder: it has no config.yaml and graph.json")
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise ExportError(f"{run} has no checkpoint that verifies; train first")
    settings = read_yaml(run / "config.yaml")
    settings.pop("dataset", None)
    try:
        flex_mg = FlexMG.from_dict(json.loads((run / "graph.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ExportError(f"cannot read {run / 'graph.json'}: {error!r}") from error
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return write_export(
        checkpoint / "adapters",
        Path(out_dir),
        flex_mg,
        TrainConfig.from_mapping(settings),
        {"iteration": state["iteration"], "eval_return": state.get("eval_return")},
    )


def write_export(
    adapters: Path,
    out_dir: Path,
    flex_mg: FlexMG,
    config: TrainConfig,
    metrics: Mapping[str, Any],
) -> Path:
    """Copy adapter folders (`adapters/NAME`) to `out_dir` with manifest and README.

    The folder is whole or not there, as with checkpoints.

    Raises:
        ExportError: `out_dir` exists and is not empty, or cannot be written.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ExportError(f"{out_dir} exists and is not empty; give a new folder")
    try:
        return write_folder_atomically(
            out_dir,
            lambda folder: _fill(folder, out_dir, adapters, flex_mg, config, metrics),
            manifest=False,
        )
    except CheckpointError as error:
        raise ExportError(str(error)) from error


def _fill(
    folder: Path,
    out_dir: Path,
    adapters: Path,
    flex_mg: FlexMG,
    config: TrainConfig,
    metrics: Mapping[str, Any],
) -> None:
    """Write into `folder` what is to be `out_dir`."""
    shutil.copytree(adapters, folder / "adapters")
    nodes = {node: flex_mg.adapter(node) for node in flex_mg.agents}
    listed = {
        name: {
            "path": f"adapters/{name}",
            "base_model": _absolute(base_model_of([n for n in nodes if nodes[n] == name], config)),
            "lora_rank": _rank(folder / "adapters" / name),
        }
        for name in dict.fromkeys(nodes.values())
    }
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "dtype": config.dtype,
        "graph_hash": flex_mg.hash,
        "nodes": nodes,
        "adapters": listed,
        "max_new_tokens": config.max_new_tokens,
        "constrain_output": config.constrain_output,
        "special_tokens_in_text": config.special_tokens_in_text,
        "metrics": dict(metrics),
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONED},
    }
    text = _readme(vllm_commands(listed, out_dir), flex_mg.agents)
    (folder / "README.md").write_text(text, encoding="utf-8")
    manifest["sha256"] = {name: _digest(folder / name) for name in _files(folder)}
    manifest["manifest_sha256"] = _manifest_digest(manifest)
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(export_dir: str | Path) -> Manifest:
    """The manifest of an export folder, every file checked against its digest.

    Raises:
        ExportError: the folder or its manifest is missing, or a file (the manifest itself
            included) is missing, changed or not in the manifest; or a path leads out of the folder.
    """
    folder = Path(export_dir)
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        given = {spec.name for spec in dataclasses.fields(Manifest) if spec.name in raw}
        manifest = Manifest(**{name: raw[name] for name in given})
        is_intact = raw["manifest_sha256"] == _manifest_digest(raw)
        paths = [str(own["path"]) for own in manifest.adapters.values()]
        digests = dict(manifest.sha256)
    except OSError as error:
        raise ExportError(
            f"{folder} is no export folder: cannot read {path.name}: {error}"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ExportError(
            f"{path} is damaged, or no manifest of an export by this version: {error!r}"
        ) from error
    if not is_intact:
        raise ExportError(f"{folder} is damaged: {MANIFEST} differs from what was exported")
    for name in [*digests, *paths]:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ExportError(f"{path} names {name!r}, which is not in its folder")
    for name, digest in digests.items():
        if not (folder / name).is_file():
            raise ExportError(f"{folder} is incomplete: {name} is missing")
        if _digest(folder / name) != digest:
            raise ExportError(f"{folder} is damaged: {name} differs from what was exported")
    for name in _files(folder):
        if name not in digests:
            raise ExportError(f"{folder} is damaged: {name} is not in its manifest")
    return manifest


def _files(folder: Path) -> list[str]:
    """Relative names of all files but the manifest, sorted."""
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in names if name != MANIFEST)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Digest of everything in a manifest but the digest itself."""
    rest = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def vllm_commands(adapters: Mapping[str, Mapping[str, Any]], out_dir: Path) -> list[str]:
    """The commands that serve bases and adapters on vLLM, one for each base model.

    Each node calls its adapter's name as the model. `adapters` is as in the manifest.
    """
    by_base: dict[str, list[str]] = {}
    for name, own in adapters.items():
        by_base.setdefault(str(own["base_model"]), []).append(name)
    commands = []
    for base, names in by_base.items():
        modules = " ".join(f"{name}={out_dir / str(adapters[name]['path'])}" for name in names)
        rank = served_rank(max(int(adapters[name]["lora_rank"]) for name in names))
        commands.append(
            f"vllm serve {base} --served-model-name base --enable-lora --max-lora-rank {rank} "
            f"--max-loras {len(names)} --lora-modules {modules}"
        )
    return commands


def _rank(adapter: Path) -> int:
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return int(config["r"])


def _absolute(base_model: str) -> str:
    """A folder as an absolute path; a hub id as it is."""
    path = Path(base_model).expanduser()
    return str(path.resolve()) if path.is_dir() else base_model


def _readme(commands: Sequence[str], nodes: Sequence[str]) -> str:
    served = "\n\n".join(commands)
    return (
        "# Adapters trained by marft-graph\n\n"
        f"LoRA adapters in PEFT format for these nodes: {', '.join(nodes)}.\n\n"
        "In process:\n\n"
        "```python\n"
        "from marft_graph import bind\n\n"
        "app = bind(graph, 'THIS_FOLDER')  # graph: your unchanged LangGraph app\n"
        "```\n\n"
        "On vLLM, where each node calls its adapter's model name:\n\n"
        f"```\n{served}\n```\n"
    )
