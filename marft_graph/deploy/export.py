"""Adapters out of a run: one PEFT folder per node and a manifest that ties them to graph and base.

An export folder is all that production needs beside the base model. Nothing here samples or trains.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import shlex
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from marft_graph.agents import base_model_of
from marft_graph.config import TrainConfig, read_yaml
from marft_graph.deploy.cards import model_card, revision_of, template_of
from marft_graph.deploy.merged import write_merged
from marft_graph.errors import ExportError
from marft_graph.graph.flex_mg import FlexMG
from marft_graph.run.checkpoint import latest_checkpoint

FORMAT = 1
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
    temperature: float | None = None
    """Sampling temperature in training; None: what the app asked for, else 1."""
    merged: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Adapter -> folder of its base model with the adapter merged in, where that was asked for."""

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
        ExportError: `run_dir` is no run folder, `out_dir` exists and is not empty, or `nodes` has
            none of the run's.
        ModelError: a base model to merge into cannot be loaded.
    """
    run = Path(run_dir)
    if not (run / "config.yaml").is_file() or not (run / "graph.json").is_file():
        raise ExportError(f"{run} is no run folder: it has no config.yaml and graph.json")
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise ExportError(f"{run} has no checkpoint that verifies; train first")
    settings = read_yaml(run / "config.yaml")
    settings.pop("dataset", None)
    flex_mg = FlexMG.from_dict(json.loads((run / "graph.json").read_text(encoding="utf-8")))
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    known = {"iteration": state["iteration"], "eval_return": state.get("eval_return")}
    return write_export(
        checkpoint / "adapters",
        Path(out_dir),
        flex_mg,
        TrainConfig.from_mapping(settings),
        known | dict(metrics or {}),
        merged=merged,
        nodes=nodes,
    )


def write_export(
    adapters: Path,
    out_dir: Path,
    flex_mg: FlexMG,
    config: TrainConfig,
    metrics: Mapping[str, Any],
    *,
    merged: bool = False,
    nodes: Sequence[str] | None = None,
) -> Path:
    """Copy adapter folders (`adapters/NAME`) to `out_dir` with manifest, model cards and README.

    Raises:
        ExportError, ModelError: as `export_run`.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ExportError(f"{out_dir} exists and is not empty; give a new folder")
    kept = [node for node in flex_mg.agents if nodes is None or node in nodes]
    if not kept:
        raise ExportError(f"no node is left to export; the run trained {', '.join(flex_mg.agents)}")
    of_node = {node: flex_mg.adapter(node) for node in kept}
    bases = {
        name: _absolute(base_model_of([n for n in kept if of_node[n] == name], config))
        for name in dict.fromkeys(of_node.values())
    }
    for name in bases:
        target = out_dir / "adapters" / name
        shutil.copytree(adapters / name, target)
        _name_base(target / "adapter_config.json", bases[name])
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
            "lora_rank": _rank(out_dir / "adapters" / name),
            "chat_template": templates[base].file if base in templates else None,
            "tool_parser": templates[base].tool_parser if base in templates else "hermes",
        }
        for name, base in bases.items()
    }
    for template in templates.values():
        (out_dir / template.file).write_text(template.text, encoding="utf-8")
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "dtype": config.dtype,
        "graph_hash": flex_mg.hash,
        "nodes": of_node,
        "adapters": listed,
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "constrain_output": config.constrain_output,
        "metrics": dict(metrics),
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONED},
    }
    if merged:
        manifest["merged"] = write_merged(out_dir, bases, config.dtype)
    for name in listed:
        card = model_card(name, manifest)
        (out_dir / "adapters" / name / "README.md").write_text(card, encoding="utf-8")
    own = {base for base, template in templates.items() if not template.is_the_models}
    commands = vllm_commands(listed, out_dir, templates=own)
    (out_dir / "README.md").write_text(_readme(commands, kept), encoding="utf-8")
    (out_dir / "compose.yaml").write_text(compose(listed, own), encoding="utf-8")
    manifest["sha256"] = {
        file.relative_to(out_dir).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out_dir.rglob("*"))
        if file.is_file()
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (out_dir / "manifest.json").write_text(text, encoding="utf-8")
    return out_dir


def read_manifest(export_dir: str | Path) -> Manifest:
    """The manifest of an export folder, every file checked against its digest.

    Raises:
        ExportError: the folder or its manifest is missing, or a file is missing or changed.
    """
    folder = Path(export_dir)
    path = folder / "manifest.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        given = {spec.name for spec in dataclasses.fields(Manifest) if spec.name in raw}
        manifest = Manifest(**{name: raw[name] for name in given})
    except OSError as error:
        raise ExportError(
            f"{folder} is no export folder: cannot read {path.name}: {error}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} is no manifest of an export: {error!r}") from error
    for name, digest in manifest.sha256.items():
        file = folder / name
        if not file.is_file():
            raise ExportError(f"{folder} is incomplete: {name} is missing")
        if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise ExportError(f"{folder} is damaged: {name} differs from what was exported")
    return manifest


def vllm_commands(
    adapters: Mapping[str, Mapping[str, Any]], out_dir: Path, *, templates: Collection[str] = ()
) -> list[str]:
    """The commands that serve bases and adapters on vLLM, one for each base model.

    Each node calls its adapter's name as the model. `adapters` is as in the manifest; `templates`
    names the bases whose tokenizer has no chat template, which are given that of the export.
    """
    return [
        shlex.join(["vllm", "serve", base, *arguments])
        for base, arguments in _served(adapters, str(out_dir), templates)
    ]


def compose(adapters: Mapping[str, Mapping[str, Any]], templates: Collection[str] = ()) -> str:
    """A compose file that serves the folder it is in, on ports from 8000 up."""
    services = {}
    for number, (base, arguments) in enumerate(_served(adapters, "/adapters", templates)):
        volumes = ["./:/adapters:ro", "~/.cache/huggingface:/root/.cache/huggingface"]
        if Path(base).is_dir():
            volumes.append(f"{base}:{base}:ro")
        gpu = {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        services["vllm" if number == 0 else f"vllm-{number + 1}"] = {
            "image": "vllm/vllm-openai:latest",
            "command": ["--model", base, *arguments],
            "ports": [f"{8000 + number}:8000"],
            "volumes": volumes,
            "ipc": "host",
            "deploy": {"resources": {"reservations": {"devices": [gpu]}}},
        }
    return yaml.safe_dump({"services": services}, sort_keys=False)


def _served(
    adapters: Mapping[str, Mapping[str, Any]], folder: str, templates: Collection[str]
) -> list[tuple[str, list[str]]]:
    """Each base model, and what vLLM is told beside its name."""
    by_base: dict[str, list[str]] = {}
    for name, own in adapters.items():
        by_base.setdefault(str(own["base_model"]), []).append(name)
    found = []
    for base, names in by_base.items():
        first = adapters[names[0]]
        rank = _served_rank(max(int(adapters[name]["lora_rank"]) for name in names))
        arguments = ["--served-model-name", "base"]
        if first.get("revision"):
            arguments += ["--revision", str(first["revision"])]
        if base in templates:
            arguments += ["--chat-template", f"{folder}/{first['chat_template']}"]
        if first.get("tool_parser"):
            arguments += ["--enable-auto-tool-choice", "--tool-call-parser", first["tool_parser"]]
        arguments += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(len(names))]
        arguments += ["--lora-modules"]
        arguments += [f"{name}={folder}/{adapters[name]['path']}" for name in names]
        found.append((base, arguments))
    return found


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
    path = Path(base_model).expanduser()
    return str(path.resolve()) if path.is_dir() else base_model


def _served_rank(rank: int) -> int:
    """vLLM accepts only these bounds on the rank."""
    return next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)


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
