"""Base models with an adapter merged in: for servers that know no LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from marft_graph.errors import ModelError
from marft_graph.policy.adapters import quietly


def write_merged(out_dir: Path, bases: Mapping[str, str], dtype: str) -> dict[str, str]:
    """Write `merged/NAME` for each adapter in `out_dir/adapters`; adapter -> that path.

    The sums of weights are made in float32 and rounded once, to the precision of the base.

    Raises:
        ModelError: a base model cannot be loaded.
    """
    paths = {}
    for name, base in bases.items():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                base, dtype=torch.float32, use_safetensors=True
            )
            tokenizer = AutoTokenizer.from_pretrained(base)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot merge {name!r}: {base} cannot be loaded: {error}") from error
        adapted = quietly(PeftModel.from_pretrained, model, out_dir / "adapters" / name)
        merged = adapted.merge_and_unload()
        paths[name] = f"merged/{name}"
        merged.to(getattr(torch, dtype)).save_pretrained(out_dir / paths[name])
        tokenizer.save_pretrained(out_dir / paths[name])
    return paths
