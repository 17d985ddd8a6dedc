"""What an export wrote, loaded again from disk: it must be what was trained. And merged models.

Nothing is said to be exported before its logits, computed by transformers and PEFT alone from the
written files, are those of the adapter that the run trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from marft_graph.errors import ExportError, ModelError
from marft_graph.policy.adapters import quietly

_TOKENS = 24
_BOUNDS = {"float32": 1e-3}
_ROUNDED_BOUND = 5e-2
"""Largest difference of a logit, as a share of the largest; of weights in 16 bits the latter."""


def check_adapters(folder: Path, trained: Path, bases: Mapping[str, str]) -> None:
    """Compare each adapter in `folder/adapters`, loaded from there, with the one in `trained`.

    Raises:
        ExportError: the logits differ.
        ModelError: a base model cannot be loaded.
    """
    for base in dict.fromkeys(bases.values()):
        model = _loaded(base)
        for name in (name for name, own in bases.items() if own == base):
            expected, found = (
                _adapted_logits(model, path / name) for path in (trained, folder / "adapters")
            )
            _compare(found, expected, f"the adapter of {name!r}", _BOUNDS["float32"])


def write_merged(out_dir: Path, bases: Mapping[str, str], dtype: str) -> dict[str, str]:
    """Write `merged/NAME` for each adapter in `out_dir/adapters`; adapter -> that path.

    The sums of weights are made in float32 and rounded once, to the precision of the base. Where an
    adapter changes the embedding or the head of a base that ties them, they are untied.

    Raises:
        ModelError: a base model cannot be loaded.
        ExportError: what was written, loaded again, has other logits than base and adapter.
    """
    paths = {}
    for name, base in bases.items():
        model = _loaded(base)
        folder = out_dir / "adapters" / name
        expected = _adapted_logits(model, folder)
        _untie(model, folder)
        adapted = quietly(PeftModel.from_pretrained, model, folder)
        merged = adapted.merge_and_unload()
        paths[name] = f"merged/{name}"
        merged.to(getattr(torch, dtype)).save_pretrained(out_dir / paths[name])
        _tokenizer(base).save_pretrained(out_dir / paths[name])
        found = _logits(_loaded(str(out_dir / paths[name])))
        bound = _BOUNDS.get(dtype, _ROUNDED_BOUND)
        _compare(found, expected, f"the merged model of {name!r} in {dtype}", bound)
    return paths


def _loaded(base: str) -> Any:
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot check an export: {base} cannot be loaded: {error}") from error
    return model.eval()


def _tokenizer(base: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot merge: the tokenizer of {base} cannot be loaded: {error}"
        ) from error


def _adapted_logits(model: Any, adapter: Path) -> Tensor:
    """Logits under an adapter; the model is as it was afterwards."""
    try:
        adapted = quietly(PeftModel.from_pretrained, model, adapter)
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        raise ExportError(f"the adapter in {adapter} cannot be loaded again: {error}") from error
    try:
        return _logits(adapted)
    finally:
        adapted.unload()
        vars(model).pop("peft_config", None)  # PEFT leaves it, and warns of it the next time


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """Logits of a fixed sequence from all over the vocabulary."""
    rows = len(model.get_input_embeddings().weight)
    ids = (torch.arange(_TOKENS) * 7919 + 1) % rows
    logits: Tensor = model(input_ids=ids.unsqueeze(0), use_cache=False).logits
    return logits.float()


def _compare(actual: Tensor, expected: Tensor, what: str, bound: float) -> None:
    most = bound * expected.abs().max().item()
    difference = (actual - expected).abs().max().item() if actual.shape == expected.shape else None
    if difference is None or not difference <= most:  # not a number is no match
        raise ExportError(
            f"{what} is not what was trained: loaded again from disk its logits differ by "
            f"{difference if difference is None else format(difference, '.3g')}, where "
            f"{most:.3g} would be rounding; nothing was exported"
        )


def _untie(model: Any, adapter: Path) -> None:
    """Give the head weights of its own if an adapter changes it, or the embedding, alone."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    adapted = quietly(PeftModel.from_pretrained, model, adapter)
    parts = [model.get_output_embeddings(), model.get_input_embeddings()]
    is_changed = any(isinstance(part, LoraLayer) for part in parts)
    adapted.unload()
    vars(model).pop("peft_config", None)
    if is_changed:
        head.weight = nn.Parameter(head.weight.detach().clone())
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
