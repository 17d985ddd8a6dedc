"""The policy: one frozen base model, and one LoRA adapter per agent on it.

Owns the weights and the tokenizer, and the two ways to run them: one adapter for a whole batch
(learner), or an adapter per row (engine). Knows nothing of episodes or of how weights change.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import json
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from langchain_core.messages import HumanMessage
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from marft_graph.agents import Agent
from marft_graph.errors import ConfigError, ModelError
from marft_graph.names import agent_of_adapter
from marft_graph.policy.beginning import SharedBeginning
from marft_graph.policy.chat import TokenizerCodec
from marft_graph.policy.devices import check_device, device_of
from marft_graph.policy.exactness import context_of, refuse_by_config, refuse_by_copy
from marft_graph.policy.grammar import Grammars
from marft_graph.policy.host_memory import give_back_large_blocks
from marft_graph.policy.last_layer import narrow_last_layer
from marft_graph.policy.lora import BASE, AdapterValues, LoraLayers
from marft_graph.policy.rows import Row, padded_ids, positions, seen
from marft_graph.policy.segments import Segments, hiding, read_segments
from marft_graph.policy.sharding import ShardedLayers
from marft_graph.policy.step import StepDecoder, name_of_cache
from marft_graph.ranks import Sharding

logger = logging.getLogger(__name__)

T = TypeVar("T")
Quantization = Literal["none", "4bit"]
# PEFT mistakes adapter names that are part of its own prefix `lora_`, such as "a", for weights.
_PREFIX = "node-"
_WEIGHTS = "adapter_model.safetensors"
_SHARED_FROM = 10_000_000
"""Parameters from which on the operations of a decode step are large enough to be shared among
threads: below, they wait for each other. An update has larger operations, and uses all threads."""
_MOST_TOKENS = sys.maxsize
_KEPT_BYTES = 2**30
"""Activations that a pass on a CPU may keep for its backward pass ..."""
_KEPT_SHARE = 0.25
"""... and on another device, as a share of its memory."""
_LARGE_PASS = 4096
"""Tokens of a pass that is large for a base which keeps no more for its backward pass."""
_MEASURED_TOKENS = 16
_LONGEST_MASKED = 2048
"""Most tokens of a row that sequences share by a mask, which has the square of that."""


class Policy:
    """A frozen causal LM with one LoRA adapter per agent.

    The model stays in eval mode at all times: adapters have no dropout, and gradients need no
    train mode, so sampling and training see the same function (ratio exactly 1 before a step).
    """

    def __init__(self, model: PeftModel, codec: TokenizerCodec, tokenizer: Any) -> None:
        self.model = model
        self.codec = codec
        self.tokenizer = tokenizer
        self.agents = tuple(name.removeprefix(_PREFIX) for name in model.peft_config)
        self.adapter_parameters = {agent: _parameters_of(model, agent) for agent in self.agents}
        base = _base_of(model)
        self.config = base.config.get_text_config()
        self._decoder = base.get_decoder()
        self._lm_head = base.get_output_embeddings()
        self._sharded: ShardedLayers | None = None
        _refuse_parameters(model)
        self._lora = LoraLayers(model)
        self._step = StepDecoder.of(self._decoder, self._lora)
        # Which adapter a whole batch uses is a state of the one model: one user at a time.
        self._in_use = threading.RLock()
        model.eval()
        if not self._lora.is_shared_state:  # else PEFT says whose turn it is
            for parameters in self.adapter_parameters.values():
                for parameter in parameters:
                    parameter.requires_grad_(True)
        self._check_head(base)
        self.reads_segments = read_segments(base, self._decoder)
        """Whether tokens of shared rows meet their own sequences alone; else there is a mask."""
        self._narrows = narrow_last_layer(self._decoder)
        self._recomputes = self._wrap_layers(base)
        self._kept_tokens: int | None = None

    @classmethod
    def load(
        cls,
        base_model: str,
        agents: Sequence[Agent],
        *,
        device: str = "auto",
        dtype: str = "float32",
        quantization: Quantization = "none",
        trust_remote_code: bool = False,
        special_tokens_in_text: bool = False,
        seed: int = 0,
    ) -> Policy:
        """Load the base once and give every agent its adapter.

        A fresh adapter changes nothing yet; one with `start_from` has the weights in that folder.

        Raises:
            ModelError: the base or an adapter to continue cannot be loaded, or the base's
                architecture is not supported.
            ConfigError: a LoRA target does not exist in the model.
        """
        base, tokenizer, codec = load_base(
            base_model,
            device,
            dtype,
            trust_remote_code,
            quantization,
            special_tokens_in_text=special_tokens_in_text,
        )
        model: PeftModel | None = None
        for agent in agents:
            _check_targets(base, agent)
        for agent in agents:
            lora = LoraConfig(
                r=agent.rank,
                lora_alpha=agent.alpha,  # type: ignore[arg-type]  # PEFT annotates int, and divides
                target_modules="all-linear"
                if agent.targets == ("all-linear",)
                else list(agent.targets),
                lora_dropout=0.0,
                task_type="CAUSAL_LM",
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed * 1_000_003 + agent.index)  # adapters differ, runs do not
                try:
                    if model is None:
                        model = quietly(
                            get_peft_model, base, lora, adapter_name=_PREFIX + agent.name
                        )
                    else:
                        quietly(model.add_adapter, _PREFIX + agent.name, lora)
                except ValueError as error:
                    raise ConfigError(f"lora_targets {list(agent.targets)}: {error}") from error
        if model is None:
            raise ConfigError("there is no agent to train: no node of the graph calls a model")
        policy = cls(model, codec, tokenizer)
        _tell_of_bare_experts(model)
        for agent in agents:
            if agent.start_from is not None:
                policy.load_adapter(agent.name, agent.start_from)
        return policy

    @classmethod
    def from_folders(
        cls,
        base_model: str,
        folders: dict[str, Path],
        *,
        device: str = "auto",
        dtype: str = "float32",
        special_tokens_in_text: bool = False,
    ) -> Policy:
        """Load the base and adapters in PEFT format (agent -> folder), for inference.

        Raises:
            ModelError: the base or an adapter cannot be loaded.
        """
        base, tokenizer, codec = load_base(
            base_model, device, dtype, special_tokens_in_text=special_tokens_in_text
        )
        model: PeftModel | None = None
        for agent, folder in folders.items():
            if not (folder / _WEIGHTS).is_file():  # PEFT would read a pickle in its place
                raise ModelError(
                    f"the adapter of {agent_of_adapter(agent)!r} in {folder} has no {_WEIGHTS}"
                )
            try:
                if model is None:
                    model = quietly(
                        PeftModel.from_pretrained, base, folder, adapter_name=_PREFIX + agent
                    )
                else:
                    model.load_adapter(folder, adapter_name=_PREFIX + agent)
            except (OSError, ValueError, LookupError, RuntimeError, SafetensorError) as error:
                raise ModelError(
                    f"cannot load the adapter of {agent_of_adapter(agent)!r} from {folder}: {error}"
                ) from error
        if model is None:
            raise ModelError("no adapter folder was given")
        return cls(model, codec, tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the base's weights are."""
        device: torch.device = self._lm_head.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the base's states."""
        dtype: torch.dtype = self._lm_head.weight.dtype
        return dtype

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return int(self._lm_head.weight.shape[0])

    @cached_property
    def parameter_count(self) -> int:
        """Parameters of the base and its adapters, embeddings left out."""
        count: int = _base_of(self.model).num_parameters(exclude_embeddings=True)
        return count

    @property
    def decode_threads(self) -> int | None:
        """Threads of torch that decode steps on a CPU do best with; None: as many as it chooses."""
        is_small = self.device.type == "cpu" and self.parameter_count < _SHARED_FROM
        return 1 if is_small else None

    @cached_property
    def attention_cost(self) -> float:
        """Work of attention between two tokens, in units of all other work for one token."""
        layers, width = int(self.config.num_hidden_layers), int(self.config.hidden_size)
        return 2 * layers * width / max(1, self.parameter_count)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Token ids that end a completion."""
        generation = _base_of(self.model).generation_config
        ends = generation.eos_token_id if generation is not None else None
        ends = list(ends) if isinstance(ends, list | tuple) else [ends]
        return frozenset(i for i in [*ends, self.tokenizer.eos_token_id] if isinstance(i, int))

    @cached_property
    def grammars(self) -> Grammars:
        """What JSON schemas allow this model to write; made when first used.

        Raises:
            ConfigError, ModelError: as in `Grammars`.
        """
        return Grammars(self.tokenizer, self.vocabulary, self.end_ids)

    @property
    def longest_shared_row(self) -> int:
        """Most tokens of a row that several sequences share."""
        return _MOST_TOKENS if self.reads_segments else _LONGEST_MASKED

    def shard(self, sharding: Sharding) -> None:
        """Divide the decoder's layers among all processes, and move the rest to their device.

        From now on all processes must make the same passes at the same time, but inside `whole`.

        Raises:
            ModelError: as in `ShardedLayers`.
        """
        adapters = [weight for own in self.adapter_parameters.values() for weight in own]
        self._step = None  # it has the layers' weights, whole
        self._sharded = ShardedLayers(self._decoder, adapters, sharding)
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(sharding.device)
        with torch.no_grad():
            self.idle_pass(self.agents[0])  # FSDP sets itself up in the first pass

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Let this process make passes of its own; begun and ended by all processes together."""
        with contextlib.nullcontext() if self._sharded is None else self._sharded.whole():
            yield

    @property
    def is_sharded(self) -> bool:
        """Whether other processes have parts of the base."""
        return self._sharded is not None

    def idle_pass(self, agent: str) -> None:
        """A pass over one token that adds nothing to any gradient.

        It keeps this process in step with others that have one more to make.
        """
        with self.using(agent):
            states = self.hidden(torch.zeros((1, 1), dtype=torch.long, device=self.device))
            if states.requires_grad:
                torch.autograd.backward(states, torch.zeros_like(states))

    def checkpoint_gradients(self) -> None:
        """Keep no activations inside layers; the backward pass computes them again."""
        self._kept_tokens = 0

    @property
    def kept_tokens(self) -> int:
        """Padded tokens of the largest pass that keeps its activations for the backward pass.

        A larger one keeps what enters each layer, and the backward pass runs the layers again: a
        long prompt needs a tenth of the memory for a third more time.
        """
        if self._kept_tokens is None:
            if self.is_sharded or not self._recomputes:
                return _MOST_TOKENS
            limit = float(_KEPT_BYTES)
            if self.device.type == "cuda":
                limit = _KEPT_SHARE * torch.cuda.get_device_properties(self.device).total_memory
            self._kept_tokens = max(1, int(limit / max(1, self.kept_bytes)))
            if self.device.type == "cpu" and self._kept_tokens < _LARGE_PASS:
                give_back_large_blocks()
        return self._kept_tokens

    @property
    def together(self) -> int:
        """Padded tokens that rows should have together in a pass with gradients.

        Cutting a batch costs less than computing activations again, if that is not wanted anyway.
        """
        return self.kept_tokens or _MOST_TOKENS

    @cached_property
    def kept_bytes(self) -> int:
        """Activations that a pass keeps for each of its tokens, measured; none computed again."""
        before, self._kept_tokens = self._kept_tokens, _MOST_TOKENS
        try:
            few, more = (self._bytes_kept(n * _MEASURED_TOKENS) for n in (1, 2))
        finally:
            self._kept_tokens = before
        return max(0, more - few) // _MEASURED_TOKENS

    def pass_bytes(self, tokens: int) -> int:
        """About what a pass over so many tokens, and the backward pass, need at their peak."""
        if tokens <= self.kept_tokens:
            return tokens * self.kept_bytes
        layers = max(1, int(self.config.num_hidden_layers))
        entering = layers * int(self.config.hidden_size) * self.dtype.itemsize
        return tokens * (entering + 3 * self.kept_bytes // layers)  # values and their gradients

    def _bytes_kept(self, tokens: int) -> int:
        """All that a pass over so many tokens keeps, weights included."""
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids = torch.zeros((1, tokens), dtype=torch.long, device=self.device)
        with (
            self.using(self.agents[0]),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            states = self.hidden(ids)
        del states
        return sum(kept.values())

    def _wrap_layers(self, base: PreTrainedModel) -> bool:
        """Let layers be computed again in a backward pass; whether there are any."""
        layers = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
        for layer in layers:
            # Not by the layer's own switch, which is one for all threads and costs rows their
            # cache.
            layer.forward = functools.partial(self._checkpointed, layer.forward)
        return bool(layers)

    def bound(self, forward: Callable[..., T]) -> Callable[..., T]:
        """A function that runs under the adapter now in use, also where a backward pass calls it.

        A backward pass may have a thread of its own, and comes when `using` has ended.
        """
        return self._lora.bound(forward)

    def _checkpointed(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A layer's forward pass; where it has many tokens, the backward pass runs it again."""
        if not torch.is_grad_enabled() or _tokens_of(args, kwargs) <= self.kept_tokens:
            return forward(*args, **kwargs)
        if self.device.type == "cpu":
            give_back_large_blocks()
        # Nothing in a layer is random: the model is in eval mode.
        return checkpoint(
            self.bound(forward), *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    def hidden(self, ids_BT: Tensor, *, is_seen_BTT: Tensor | None = None, **inputs: Any) -> Tensor:
        """Last hidden states (B, T, H) of right-padded ids, under the adapters now in use.

        `is_seen_BTT` says which tokens (third axis) a token (second) attends to; None: all before
        it. Causal attention never looks right, so padding after a row's end changes none of its
        states. `cache`: keys and values of the tokens before these, which takes those of these.
        """
        inputs.setdefault("use_cache", False)
        if "cache" in inputs:
            inputs[name_of_cache(self._decoder)] = inputs.pop("cache")
        if is_seen_BTT is not None:
            inputs["attention_mask"] = hiding(is_seen_BTT, self.dtype).unsqueeze(1)
        states: Tensor = self._decoder(input_ids=ids_BT, **inputs).last_hidden_state
        return states

    def states(self, ids_BT: Tensor, place_N: Tensor, **inputs: Any) -> Tensor:
        """Last hidden states (N, H) at some places among all B * T tokens; as `hidden` otherwise.

        What others are not asked for is not computed, where the base lets that be.
        """
        rows = self._lora.current_rows  # a token that was picked out has no row of its own
        is_one = rows is None or (rows.only is not None and not self._lora.is_shared_state)
        if not (self._narrows and is_one):
            return self.hidden(ids_BT, **inputs).flatten(0, 1)[place_N]
        wanted, found_N = torch.unique(place_N, return_inverse=True)
        return self.hidden(ids_BT, wanted=wanted, **inputs)[0, found_N]

    def states_of(
        self, rows: Sequence[Row], row_N: Tensor, column_N: Tensor, **inputs: Any
    ) -> Tensor:
        """Last hidden states (N, H) at some columns of rows, under the adapters now in use."""
        ids_BT = torch.from_numpy(padded_ids(rows)).to(self.device)
        place_N = row_N * ids_BT.shape[1] + column_N
        if any(len(row.members) > 1 for row in rows):
            inputs["position_ids"] = torch.from_numpy(positions(rows)).to(self.device)
            if self.reads_segments:
                inputs["segments"] = Segments(rows, self.device, self.dtype)
            else:
                inputs["is_seen_BTT"] = torch.from_numpy(seen(rows)).to(self.device)
        return self.states(ids_BT, place_N, **inputs)

    def step(
        self,
        ids_B: Tensor,
        *,
        position_B: Tensor,
        is_seen_BL: Tensor,
        cache: Cache,
        beginning: SharedBeginning | None = None,
    ) -> Tensor:
        """Last hidden states (B, H) of one token per row, inside `using_rows`.

        Its keys and values go to `cache`; `is_seen_BL` says which of the tokens there a row sees,
        the new one included. `beginning` says which rows begin alike.
        """
        rows = self._lora.current_rows
        is_seen_B1L = is_seen_BL.unsqueeze(1)
        if self._step is not None and rows is not None:
            hidden_B1L = hiding(is_seen_B1L, self.dtype)
            return self._step(ids_B, position_B, hidden_B1L, cache, rows, beginning)
        return self.hidden(
            ids_B.unsqueeze(-1),
            is_seen_BTT=is_seen_B1L,
            position_ids=position_B.unsqueeze(-1),
            cache=cache,
            use_cache=True,
        )[:, -1]

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits (N, V) of hidden states, scaled or capped as the model's config asks for."""
        logits: Tensor = self._lm_head(hidden_NH)
        if scale := getattr(self.config, "logit_scale", None):
            logits = logits * scale
        if scaling := getattr(self.config, "logits_scaling", None):
            logits = logits / scaling
        if cap := getattr(self.config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    @contextlib.contextmanager
    def using(self, agent: str | None) -> Iterator[None]:
        """Run whole batches under one agent's adapter, its weights trainable; None: the base."""
        if not self._lora.is_shared_state:
            with self._lora.whole(BASE if agent is None else _PREFIX + agent):
                yield
            return
        with self._in_use:
            if agent is None:
                with self.model.disable_adapter():
                    yield
                return
            self.model.set_adapter(_PREFIX + agent)
            yield

    @contextlib.contextmanager
    def using_rows(self, agents: Sequence[str | None]) -> Iterator[None]:
        """Run batches whose row i is under `agents[i]`'s adapter (None: the base); no gradients.

        Rows see the adapters as they were when `publish` was called last.
        """
        names = [BASE if agent is None else _PREFIX + agent for agent in agents]
        lock = self._in_use if self._lora.is_shared_state else contextlib.nullcontext()
        with lock, torch.no_grad(), self._lora.rows(names):
            yield

    @property
    def rows_follow_training(self) -> bool:
        """Whether some layers' rows see the adapters as they are, whatever was published.

        So it is with layers that stay with PEFT: those of a quantized base, and embeddings.
        """
        return self._lora.is_shared_state

    def publish(self, values: AdapterValues | None = None) -> None:
        """Let rows use the adapters as they are now, or as they were when copied."""
        self._lora.publish(values)

    def save_adapter(self, agent: str, folder: Path, values: AdapterValues | None = None) -> None:
        """Write one adapter in PEFT format (safetensors) into `folder`, as it is or was copied."""
        # PEFT's own `save_pretrained` also renders a model card, which takes longer than the rest.
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.adapter_weights(agent, values), folder / _WEIGHTS, metadata={"format": "pt"})
        lora = copy.copy(self.model.peft_config[_PREFIX + agent])
        lora.inference_mode = True
        lora.base_model_name_or_path = _base_of(self.model).name_or_path
        lora.save_pretrained(str(folder))

    def load_adapter(self, agent: str, folder: Path) -> None:
        """Overwrite one agent's adapter with the weights in `folder`.

        Raises:
            ModelError: the file is missing or holds weights of another shape.
        """
        path = folder / _WEIGHTS
        try:
            saved = load_file(path)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"cannot read adapter weights from {path}: {error}") from error
        self.set_adapter_weights(agent, saved, source=str(path))

    def adapter_weights(self, agent: str, values: AdapterValues | None = None) -> dict[str, Tensor]:
        """One adapter's weights on the CPU, by the names that they have in PEFT's files.

        They are as they are now, or as `values` has copied them. On a CPU they share memory with
        the weights that are trained.
        """
        return {
            name: (values or {}).get(parameter, parameter).detach().cpu().contiguous()
            for name, parameter in self._own_parameters(agent).items()
        }

    def set_adapter_weights(self, agent: str, saved: Mapping[str, Tensor], source: str) -> None:
        """Overwrite one agent's adapter; `source` says in errors where the weights are from.

        Raises:
            ModelError: they have other names or shapes than the adapter's.
        """
        own = self._own_parameters(agent)
        if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in own.items()}:
            raise ModelError(
                f"{source} was made with another base model, rank or LoRA targets than "
                f"{agent_of_adapter(agent)!r}"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(saved[name])

    def _own_parameters(self, agent: str) -> dict[str, nn.Parameter]:
        """An adapter's weights by the names that they have in PEFT's files."""
        own = re.compile(rf"\.{re.escape(_PREFIX + agent)}(?=\.|$)")
        return {
            own.sub("", name): parameter
            for name, parameter in self.model.named_parameters()
            if own.search(name)
        }

    def _check_head(self, base: PreTrainedModel) -> None:
        """Refuse a model whose logits are not head(hidden): its log-probs would be wrong."""
        ids = torch.arange(min(8, self.vocabulary), device=self.device).unsqueeze(0)
        with torch.no_grad():
            ours = self.logits(self.hidden(ids)).float()
            theirs = base(input_ids=ids, use_cache=False).logits.float()
        if not torch.allclose(ours, theirs, atol=1e-3, rtol=1e-3):
            raise ModelError(
                f"{type(base).__name__} computes its logits in a way marft-graph does not know "
                f"(largest difference {(ours - theirs).abs().max():.2g}); Llama, Qwen, Mistral, "
                "Gemma, Phi and Granite style models are supported"
            )


def load_base(
    base_model: str,
    device: str,
    dtype: str,
    trust_remote_code: bool = False,
    quantization: Quantization = "none",
    *,
    special_tokens_in_text: bool = False,
) -> tuple[PreTrainedModel, Any, TokenizerCodec]:
    """The frozen base model, its tokenizer and codec.

    Raises:
        ModelError: nothing is found there, its attention is not full attention, or what the
            quantization needs is not installed.
    """
    source = check_base(base_model, device, quantization)
    target = device_of(device)
    more = {} if quantization == "none" else _quantized(dtype, target)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        refuse_by_config(config, base_model)
        refuse_by_copy(config, base_model, _with_fresh_adapter)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        base = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            attn_implementation="sdpa",
            **more,
        )
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, json.JSONDecodeError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(
            f"base_model {base_model!r} cannot be loaded: {first_line} (give a hub id such as "
            "Qwen/Qwen2.5-0.5B-Instruct, or a folder with config.json and model.safetensors)"
        ) from error
    if not more:
        base.to(target)  # type: ignore[arg-type]
    base.requires_grad_(False)
    codec = TokenizerCodec(
        tokenizer,
        context_of(base.config.get_text_config()),
        special_tokens_in_text=special_tokens_in_text,
    )
    _check_template(base, tokenizer, codec, base_model)
    return base, tokenizer, codec


def _check_template(
    base: PreTrainedModel, tokenizer: Any, codec: TokenizerCodec, base_model: str
) -> None:
    """Refuse a chat template that writes tokens for which the model has no embedding."""
    rows = len(base.get_input_embeddings().weight)  # type: ignore[arg-type]
    try:
        ids = codec.render([HumanMessage("Hello")])
    except ModelError:  # it wants other roles: each call will say so
        ids = ()
    for token in ids:
        if token >= rows:
            raise ModelError(
                f"base_model {base_model!r} is refused: its chat template writes "
                f"{tokenizer.convert_ids_to_tokens(token)!r}, token {token}, and its embedding has "
                f"{rows} rows; resize the embedding when tokens are added, and save both again"
            )


def _refuse_parameters(model: PeftModel) -> None:
    """Refuse adapters on bare parameters.

    PEFT merges such an adapter into the parameter while a layer runs: rows of several adapters
    cannot share a batch then.
    """
    wrapped = [name for name, part in model.named_modules() if isinstance(part, ParamWrapper)]
    if wrapped:
        raise ModelError(
            f"the LoRA targets reach parameters of fused experts ({wrapped[0]}), on which adapters "
            "of several nodes cannot run in one batch; give lora_targets that are linear layers, "
            "such as q_proj, k_proj, v_proj and o_proj"
        )


def _tell_of_bare_experts(model: PeftModel) -> None:
    """Say where parts of a mixture have no adapter."""
    adapted = {name for name, part in model.named_modules() if isinstance(part, LoraLayer)}
    bare = [
        name
        for name, part in model.named_modules()
        if name.endswith("experts")
        and not any(own.startswith(name) for own in adapted)
        and any(True for _ in part.parameters())
    ]
    if bare:
        logger.warning(
            "%d groups of experts of this mixture get no LoRA and stay as they are (%s)",
            len(bare),
            bare[0].removeprefix("base_model.model."),
        )


def _with_fresh_adapter(model: PreTrainedModel) -> Policy:
    """A policy on a model without a tokenizer, to compare numbers with."""
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    attention = sorted({name.rpartition(".")[2] for name in linear if "attn" in name})
    targets = attention or "all-linear"  # PEFT makes parameters of some experts out of the latter
    lora = LoraConfig(r=2, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")
    own = quietly(get_peft_model, model, lora, adapter_name=_PREFIX + "check")
    unused: Any = None
    return Policy(own, unused, unused)


def check_base(base_model: str, device: str, quantization: Quantization = "none") -> str:
    """Refuse what cannot be loaded, as far as that shows without loading it.

    Returns:
        What transformers is to load: a folder or a hub id.

    Raises:
        ConfigError: no base is named, or the device is not there.
        ModelError: there is no such folder, or what the quantization needs is not installed.
    """
    if not base_model:
        raise ConfigError(
            "base_model is empty; give a hub id such as Qwen/Qwen2.5-0.5B-Instruct or a folder"
        )
    check_device(device)
    if quantization != "none":
        _require_bitsandbytes(quantization)
    path = Path(os.path.expanduser(base_model))
    looks_local = base_model.startswith((".", "~", "/")) or base_model.count("/") != 1
    if looks_local and not path.is_dir() and (path.is_absolute() or "/" in base_model):
        raise ModelError(
            f"base_model {base_model!r}: there is no such folder; give a hub id such as "
            "Qwen/Qwen2.5-0.5B-Instruct, or a folder with config.json and model.safetensors"
        )
    return str(path) if path.is_dir() else base_model


def _require_bitsandbytes(quantization: Quantization) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"quantization {quantization} needs bitsandbytes: pip install 'marft-graph[quantize]'"
        )


def _quantized(dtype: str, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` needs for a base in 4 bits (QLoRA's NF4, arXiv 2305.14314)."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        bnb_4bit_use_double_quant=True,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _check_targets(base: PreTrainedModel, agent: Agent) -> None:
    """Refuse LoRA targets that no module has: PEFT is content with one that does."""
    if agent.targets == ("all-linear",):
        return
    names = [name for name, _ in base.named_modules()]
    ends = {
        name.rpartition(".")[2]
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear)
    }
    for target in agent.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ConfigError(
                f"lora_targets of {agent_of_adapter(agent.name)!r} has {target!r}, which no module "
                f"of the base is called; linear layers are {', '.join(sorted(ends))}"
            )


def _tokens_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Tokens of the states (B, T, H) that a layer reads."""
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return states.shape[:-1].numel()


def _base_of(model: PeftModel) -> PreTrainedModel:
    base = model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        raise ModelError(f"{type(base).__name__} is no transformers model")
    return base


def _parameters_of(model: PeftModel, agent: str) -> list[nn.Parameter]:
    return [
        parameter for name, parameter in model.named_parameters() if f".{_PREFIX}{agent}." in name
    ]


def quietly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call PEFT without warnings about what it does itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        # Of patterns for experts that PEFT writes itself, wanted or not.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
        # A Conv1D's weights stand the other way round, which PEFT then says that it has noticed.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # see merged.py
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
        return function(*args, **kwargs)
