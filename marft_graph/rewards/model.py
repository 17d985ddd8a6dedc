"""A reward model: a sequence classifier with one label, whose logit is the reward.

Knows nothing of episodes: it scores texts, those that wait at one time in one batch.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from langchain_core.messages import convert_to_openai_messages
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from marft_graph.errors import ConfigError, ModelError, RewardError

Text = str | Sequence[Any]
_GATHER_SECONDS = 0.005


class RewardModel:
    """A reward function that scores a text with a model from the hub or a folder.

    The logit of the model's one label is the outcome. Texts of episodes that end at about the same
    time share a batch, so scores may differ in their last digits from run to run.

    Args:
        model: hub id or local folder of a sequence classifier with one label; safetensors only, and
            no code from the hub is run.
        text: `text(example, state)`: what is scored. A string is scored as it is; messages (of
            LangChain, or role/content dicts) go through the tokenizer's chat template.
        device: torch device; auto lets accelerate choose.
        dtype: precision of the weights.
        batch_size: most texts in one forward pass.
        max_length: most tokens of a text; none: as many as the model takes.

    Raises:
        ModelError: it cannot be loaded, has several labels, or was never trained to score.

    Examples:
        RewardModel("org/reward-model", lambda example, state: state["messages"])
    """

    def __init__(
        self,
        model: str | Path,
        text: Callable[[Mapping[str, Any], Any], Text],
        *,
        device: str = "auto",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        batch_size: int = 16,
        max_length: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        self._name = str(model)
        self._text = text
        self._model, self._tokenizer = _load(self._name, device, dtype)
        config = self._model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None) or 10**9
        self._max_length = min(max_length or context, context)
        self._pad_id = config.pad_token_id
        # Without a token of its own for padding, where a text ends could not be told in a batch.
        self._batch_size = batch_size if self._pad_id is not None else 1
        self._lock = threading.Lock()
        self._waiting: list[tuple[list[int], Future[float]]] = []
        self._is_running = False
        self.batches = 0
        """Forward passes so far."""

    async def __call__(self, example: Mapping[str, Any], state: Any) -> float:
        """The score of one episode."""
        return await asyncio.wrap_future(self._submit(self._text(example, state)))

    def score(self, texts: Sequence[Text]) -> list[float]:
        """Scores of some texts, in their order."""
        futures = [self._submit(text) for text in texts]
        return [future.result() for future in futures]

    def _submit(self, text: Text) -> Future[float]:
        ids = self._ids(text)
        future: Future[float] = Future()
        with self._lock:
            self._waiting.append((ids, future))
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._work, name="marft-reward", daemon=True).start()
        return future

    def _ids(self, text: Text) -> list[int]:
        if isinstance(text, str):
            ids = self._tokenizer(text)["input_ids"]
        else:
            messages = convert_to_openai_messages(list(text))
            try:
                ids = self._tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
            except ValueError as error:
                raise RewardError(f"reward model {self._name!r}: {error}") from error
        if not 0 < len(ids) <= self._max_length:
            raise RewardError(
                f"reward model {self._name!r} was given a text of {len(ids)} tokens; it takes 1 to "
                f"{self._max_length}. Shorten it in text="
            )
        return list(ids)

    def _work(self) -> None:
        """Score what waits, batch by batch, until nothing does."""
        while True:
            self._gather()
            with self._lock:
                # Texts of like length together: less padding.
                self._waiting.sort(key=lambda entry: len(entry[0]))
                batch = self._waiting[: self._batch_size]
                del self._waiting[: self._batch_size]
                if not batch:
                    self._is_running = False
                    return
            self._settle_all(batch)

    def _settle_all(self, batch: Sequence[tuple[list[int], Future[float]]]) -> None:
        """Score a batch; where that fails, each text by itself, and only its own score fails."""
        try:
            scores = self._forward([ids for ids, _ in batch])
        except BaseException as error:  # noqa: BLE001 - raised in whoever waits
            if len(batch) == 1:
                _settle(batch[0][1], error)
                return
        else:
            for (_, future), score in zip(batch, scores, strict=True):
                _settle(future, score)
            return
        for entry in batch:
            self._settle_all([entry])

    def _gather(self) -> None:
        """Wait a moment for others, as long as more keep coming and a batch is not full."""
        seen = -1
        while seen < len(self._waiting) < self._batch_size:
            seen = len(self._waiting)
            time.sleep(_GATHER_SECONDS)

    def _forward(self, rows: Sequence[list[int]]) -> list[float]:
        length = max(map(len, rows))
        pad = self._pad_id if self._pad_id is not None else 0
        device = self._model.device
        ids_BT = torch.tensor([row + [pad] * (length - len(row)) for row in rows], device=device)
        mask_BT = torch.tensor(
            [[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device
        )
        with torch.inference_mode():
            logits_B1 = self._model(input_ids=ids_BT, attention_mask=mask_BT).logits
        self.batches += 1
        return [float(logit) for logit in logits_B1[:, 0].float().cpu()]


def _settle(future: Future[float], outcome: float | BaseException) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _load(name: str, device: str, dtype: str) -> tuple[Any, Any]:
    path = Path(os.path.expanduser(name))
    source = str(path) if path.is_dir() else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, json.JSONDecodeError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(
            f"reward model {name!r} cannot be loaded: {first_line} (give a hub id, or a folder "
            "with config.json and model.safetensors)"
        ) from error
    if model.config.num_labels != 1:
        raise ModelError(
            f"reward model {name!r} has {model.config.num_labels} labels; a reward model has one, "
            "whose logit is the reward"
        )
    if report["missing_keys"]:
        raise ModelError(
            f"reward model {name!r} lacks weights ({', '.join(sorted(report['missing_keys']))}): "
            "it was never trained to score"
        )
    config = model.config.get_text_config()
    if config.pad_token_id is None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        config.pad_token_id = tokenizer.pad_token_id
    target = PartialState().device if device == "auto" else torch.device(device)
    model.to(target).eval().requires_grad_(False)
    return model, tokenizer
