"""What an export says of its base models and adapters: revisions, chat templates, model cards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer

from marft_graph.names import agent_of_adapter
from marft_graph.policy.chat import PLAIN_TEMPLATE
from marft_graph.policy.fingerprint import base_folder
from marft_graph.policy.tool_formats import detect_format

_TOOL_PARSERS = {
    "hermes": "hermes",
    "xml": "qwen3_coder",
    "llama": "llama3_json",
    "mistral": "mistral",
}
"""Our names of tool-call formats, and vLLM's."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The template that prompts were rendered with."""

    text: str
    is_the_models: bool
    """Whether the base model's tokenizer has it; else a server must be given it."""
    file: str
    """Its name in the export folder."""
    tool_parser: str
    """What vLLM calls the form in which the template writes tool calls."""


def template_of(base_model: str, number: int = 1) -> ChatTemplate | None:
    """The chat template of a base model, or what stands in for it; None if the base is not here."""
    try:
        template = AutoTokenizer.from_pretrained(base_model, local_files_only=True).chat_template
    except (OSError, ValueError):
        return None
    if isinstance(template, Mapping):
        template = template.get("default") or next(iter(template.values()))
    name = f"chat_template{'' if number == 1 else f'_{number}'}.jinja"
    text = str(template or PLAIN_TEMPLATE)
    return ChatTemplate(text, bool(template), name, _TOOL_PARSERS[detect_format(text).name])


def revision_of(base_model: str) -> str | None:
    """The commit of a hub model that was used, as the cache has it; None for a folder."""
    folder = base_folder(base_model)
    return None if folder is None or Path(base_model).is_dir() else folder.name


def model_card(adapter: str, manifest: Mapping[str, Any]) -> str:
    """The README.md of an adapter, as PEFT and the Hugging Face hub read it."""
    own = manifest["adapters"][adapter]
    nodes = [node for node, name in manifest["nodes"].items() if name == adapter]
    head: dict[str, Any] = {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "marft-graph", "langgraph", "reinforcement-learning"],
    }
    if not Path(own["base_model"]).is_dir():  # the hub knows no folders
        head = {"base_model": own["base_model"], **head}
    metrics = {name: value for name, value in manifest["metrics"].items() if value is not None}
    asked = manifest["temperature"]
    temperature = "what the app asked for, else 1" if asked is None else f"{asked:g}"
    base = own["base_model"] + (f", revision {own['revision']}" if own.get("revision") else "")
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n"
        f"# {agent_of_adapter(adapter)}\n\n"
        f"LoRA adapter (rank {own['lora_rank']}) of the node{'s' if len(nodes) > 1 else ''} "
        f"{', '.join(f'`{node}`' for node in nodes)} of a LangGraph app, trained by marft-graph "
        "with multi-agent reinforcement fine-tuning. It was trained together with the app's other "
        "nodes, on the prompts that the app gives it: by itself it is of little use.\n\n"
        "| | |\n|---|---|\n"
        f"| base model | {base} |\n"
        f"| trained with | {manifest['dtype']} base, at most {manifest['max_new_tokens']} new "
        f"tokens, temperature {temperature} |\n"
        f"| graph | {manifest['graph_hash']} |\n"
        f"| figures | {json.dumps(metrics, ensure_ascii=False)} |\n"
        f"| versions | {', '.join(f'{k} {v}' for k, v in manifest['versions'].items())} |\n\n"
        "```python\n"
        "from peft import AutoPeftModelForCausalLM\n\n"
        "model = AutoPeftModelForCausalLM.from_pretrained('THIS_FOLDER')\n"
        "```\n"
    )
