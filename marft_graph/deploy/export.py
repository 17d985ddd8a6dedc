"""Adapters out of a run: one PEFT folder per node and a manifest that ties them to graph and base.

An export folder is all that production needs beside the base model. Nothing here samples or trains.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marft_graph.agents import base_model_of
from marft_graph.config import TrainConfig, read_yaml
from marft_graph.deploy.cards import model_card, revision_of, template_of
from marft_graph.deploy.manifest import (
    FORMAT,
    MANIFEST,
    check_same_bases,
    digest_of,
    files_of,
    sealed,
)
from marft_graph.deploy.merged import check_adapters, write_merged
from marft_graph.deploy.serving import compose, vllm_commands
from marft_graph.errors import CheckpointError, ExportError
from marft_graph.graph.flex_mg import FlexMG
from marft_graph.run.checkpoint import latest_checkpoint, write_folder_atomically
from marft_graph.run.folder import read_base_files

_VERSIONED = ("marft-graph", "torch", "transformers", "peft", "langgraph", "langchain-core")


def export_run(
    run_dir: str | Path,
    out_dir: str | Path,
    *,
    merged: bool = False,
    nodes: Sequence[str] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Path:
    """Write the adapters of a run's newest intact checkpoint to `out_dir`.

    Args:
        run_dir: a run folder.
        out_dir: a new folder.
        merged: also write each base model with an adapter merged in, ready to be served by itself.
        nodes: only these; the app's own models answer for the others. None: all.
        metrics: more figures for the manifest and the model cards.

    Raises:
        ExportError: `run_dir` is no run folder, `out_dir` exists and is not empty, `nodes` has
            none of the run's, a base model to merge into is another than in training, or what was
            written and loaded again has other logits than what was trained.
        ModelError: a base model to merge into cannot be loaded.
        CheckpointError: the run's `base_models.json` is damaged.
    """
    run = Path(run_dir)
    if not all(os.path.isfile(run / name) for name in ("config.yaml", "graph.json")):
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
    known = {"iteration": state["iteration"], "eval_return": state.get("eval_return")}
    return write_export(
        checkpoint / "adapters",
        Path(out_dir),
        flex_mg,
        TrainConfig.from_mapping(settings),
        known | dict(metrics or {}),
        read_base_files(run),
        merged=merged,
        nodes=nodes,
    )


def write_export(
    adapters: Path,
    out_dir: Path,
    flex_mg: FlexMG,
    config: TrainConfig,
    metrics: Mapping[str, Any],
    base_files: Mapping[str, Mapping[str, str]],
    *,
    merged: bool = False,
    nodes: Sequence[str] | None = None,
) -> Path:
    """Copy adapter folders (`adapters/NAME`) to `out_dir` with manifest, model cards and README.

    `base_files` has the `fingerprint` of each base model as it was in training, where that is
    known. The folder is whole or not there, as with checkpoints.

    Raises:
        ExportError, ModelError: as `export_run`.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ExportError(f"{out_dir} exists and is not empty; give a new folder")
    kept = [node for node in flex_mg.agents if nodes is None or node in nodes]
    if not kept:
        raise ExportError(f"no node is left to export; the run trained {', '.join(flex_mg.agents)}")
    try:
        return write_folder_atomically(
            out_dir,
            lambda folder: _fill(
                folder,
                out_dir,
                adapters,
                flex_mg,
                config,
                metrics,
                base_files,
                kept,
                merged=merged,
            ),
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
    base_files: Mapping[str, Mapping[str, str]],
    kept: Sequence[str],
    *,
    merged: bool,
) -> None:
    """Write into `folder` what is to be `out_dir`."""
    of_node = {node: flex_mg.adapter(node) for node in kept}
    named = {
        name: base_model_of([n for n in kept if of_node[n] == name], config)
        for name in dict.fromkeys(of_node.values())
    }
    bases = {name: _absolute(base) for name, base in named.items()}
    for name in bases:
        target = folder / "adapters" / name
        shutil.copytree(adapters / name, target)
        _name_base(target / "adapter_config.json", bases[name])
    check_adapters(folder, adapters, bases)
    templates = {
        base: template
        for number, base in enumerate(dict.fromkeys(bases.values()), 1)
        if (template := template_of(base, number)) is not None
    }
    listed = {
        name: {
            "path": f"adapters/{name}",
            "base_model": base,
            "revision": revision_of(base),
            "base_files": base_files.get(named[name], {}),
            "lora_rank": _rank(folder / "adapters" / name),
            "chat_template": templates[base].file if base in templates else None,
            "tool_parser": templates[base].tool_parser if base in templates else "hermes",
        }
        for name, base in bases.items()
    }
    for template in templates.values():
        (folder / template.file).write_text(template.text, encoding="utf-8")
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "dtype": config.dtype,
        "graph_hash": flex_mg.hash,
        "nodes": of_node,
        "frozen": list(flex_mg.frozen),
        "adapters": listed,
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "constrain_output": config.constrain_output,
        "schema_in_prompt": config.schema_in_prompt,
        "special_tokens_in_text": config.special_tokens_in_text,
        "metrics": dict(metrics),
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONED},
    }
    if merged:
        if config.quantization != "none":
            raise ExportError(
                f"merged models need whole weights, and these adapters were trained on a base in "
                f"{config.quantization}; serve them beside that base, as adapters"
            )
        check_same_bases(out_dir, listed, bases)
        manifest["merged"] = write_merged(folder, bases, config.dtype)
    for name in listed:
        card = model_card(name, manifest)
        (folder / "adapters" / name / "README.md").write_text(card, encoding="utf-8")
    own = {base for base, template in templates.items() if not template.is_the_models}
    commands = manifest["serve"] = vllm_commands(listed, out_dir, templates=own)
    (folder / "README.md").write_text(_readme(commands, kept), encoding="utf-8")
    (folder / "compose.yaml").write_text(compose(listed, own), encoding="utf-8")
    manifest["sha256"] = {name: digest_of(folder / name) for name in files_of(folder)}
    (folder / MANIFEST).write_bytes(sealed(manifest))


def _name_base(path: Path, base: str) -> None:
    """PEFT finds the base model by the name in an adapter's own file."""
    own = json.loads(path.read_text(encoding="utf-8"))
    own["base_model_name_or_path"] = base
    path.write_text(json.dumps(own, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _rank(adapter: Path) -> int:
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return int(config["r"])


def _absolute(base_model: str) -> str:
    """A folder as an absolute path; a hub id as it is."""
    path = Path(os.path.expanduser(base_model))
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
        f"```\n{served}\n```\n\n"
        "or, in containers: `docker compose up` in this folder. Then:\n\n"
        "```python\n"
        "app = bind(graph, 'THIS_FOLDER', base_url='http://localhost:8000/v1')\n"
        "```\n"
    )
