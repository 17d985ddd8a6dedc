"""How an export is served: the commands of vLLM, and a compose file."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from marft_graph.engine.vllm.server import served_rank


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
        rank = served_rank(max(int(adapters[name]["lora_rank"]) for name in names))
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
