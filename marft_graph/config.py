"""Every setting of a training run, in one frozen dataclass.

A field's metadata carries its description, unit and range: validation, `--help` and the settings
page of the documentation all read them from here, so they cannot disagree. Library functions take
the values they need; only the trainer and the command line know `TrainConfig`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from marft_graph.episode import LARGEST_REWARD
from marft_graph.errors import ConfigError
from marft_graph.rollout.settings import RolloutSettings

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""What `trackers` may name; each is the name of the package too."""
MICROBATCH_TOKENS = 4096
"""Padded tokens in one forward pass, where nobody says or measures otherwise."""


def setting(
    default: Any,
    help: str,
    *,
    unit: str = "",
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field with its description, unit and range (bounds inclusive but `above`).

    `dict` as the default stands for an empty one.
    """
    metadata = {
        "help": help,
        "unit": unit,
        "at_least": at_least,
        "at_most": at_most,
        "above": above,
    }
    if default is dict:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


_LARGEST = sys.float_info.max
_YEAR = 365 * 86_400
"""Seconds; threads cannot wait for much longer (`threading.TIMEOUT_MAX`)."""


class _ByStaleness:
    """The default of `importance_cap`, which `staleness` decides."""

    def __str__(self) -> str:
        return "2 with staleness, else none"


_BY_STALENESS = _ByStaleness()
_STALE_CAP = 2.0


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """Settings of one node that differ from the run's; None: as the run says.

    Raises:
        ConfigError: as for `TrainConfig`.
    """

    adapter: str | None = setting(
        None, "name of its adapter; nodes that give the same name, or another node's, share one"
    )
    base_model: str | None = setting(None, "base model under its adapter")
    lora_rank: int | None = setting(None, "rank of its adapter", at_least=1, at_most=65_536)
    lora_alpha: float | None = setting(None, "LoRA scale of its adapter", above=0)
    lora_targets: tuple[str, ...] | None = setting(None, "modules that its adapter changes")
    learning_rate: float | None = setting(None, "AdamW step of its adapter", above=0)
    start_from: str | None = setting(
        None, "folder of an adapter in PEFT format to continue; it keeps its rank and targets"
    )

    def __post_init__(self) -> None:
        _check_fields(self)

    def to_dict(self) -> dict[str, Any]:
        """The settings that are given, as plain values."""
        return _plain({k: v for k, v in dataclasses.asdict(self).items() if v is not None})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run; every field has a default but `base_model`.

    Raises:
        ConfigError: a value has the wrong type or is out of range; the message names the setting,
            the value and what is accepted.

    >>> TrainConfig(base_model="Qwen/Qwen2.5-0.5B-Instruct", learning_rate=1e-5).group_size
    8
    >>> TrainConfig(base_model="m", clip_ratio=-1)
    Traceback (most recent call last):
    ...
    marft_graph.errors.ConfigError: clip_ratio is -1; it must be above 0
    """

    # Models
    base_model: str = setting(
        "", "hub id or local folder of the frozen causal LM under all adapters"
    )
    device: str = setting("auto", "torch device of the base model; auto lets accelerate choose")
    cpu_threads: int | None = setting(
        None,
        "threads of torch on a CPU; none: what torch chooses, but one in the rollouts of a base of "
        "under 10 million parameters, whose operations are too small to be shared",
        at_least=1,
        at_most=1024,
    )
    dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", "precision of the frozen base; adapters are always float32"
    )
    quantization: Literal["none", "4bit"] = setting(
        "none", "precision in which the frozen base is kept; 4bit needs the extra `quantize`"
    )
    gradient_checkpointing: bool = setting(
        False, "compute activations twice in the update, to keep fewer of them in memory"
    )
    trust_remote_code: bool = setting(
        False, "run Python code that comes with the base model from the hub"
    )
    special_tokens_in_text: bool = setting(
        False,
        "encode special tokens that messages and data contain as such, so that they may open turns "
        "of their own; otherwise they are plain text",
    )
    nodes: tuple[str, ...] = setting(
        (), "nodes to train, as `inspect` names them; none: every agent"
    )
    new_nodes: Literal["stop", "freeze", "train"] = setting(
        "stop",
        "a node that calls a model and that neither code nor dry run showed: stop with an error, "
        "freeze it (its own model answers), or train it (with a new adapter)",
    )
    lora_rank: int = setting(16, "rank of each node's LoRA adapter", at_least=1, at_most=65_536)
    lora_alpha: float = setting(32.0, "LoRA scale: updates are multiplied by alpha / rank", above=0)
    lora_targets: tuple[str, ...] = setting(
        ("all-linear",), "names of the modules that get LoRA; all-linear: every linear layer"
    )

    start_from: str | None = setting(
        None, "export folder of an earlier run, whose adapters are continued"
    )
    per_node: Mapping[str, NodeSettings] = setting(
        dict, "settings of single nodes: adapter, base_model, lora_*, learning_rate"
    )

    # Rollout
    iterations: int = setting(100, "training iterations (rollout, then update)", at_least=0)
    examples_per_iteration: int = setting(
        8, "examples in an iteration; a data set with fewer is begun again", at_least=1
    )
    group_size: int = setting(8, "episodes of each example in an iteration", at_least=1)
    temperature: float | None = setting(
        None, "sampling temperature in training; none: what the app asks for, else 1", at_least=0
    )
    max_new_tokens: int = setting(
        256, "most tokens of a completion, where the app sets no limit", unit="tokens", at_least=1
    )
    cap_new_tokens: bool = setting(
        False, "let max_new_tokens also bound calls for which the app itself allows more"
    )
    recursion_limit: int | None = setting(
        None,
        "steps that a graph may take in an episode; none: what the app sets by with_config, else "
        "25",
        at_least=1,
        at_most=1_000_000,
    )
    constrain_output: bool = setting(
        False,
        "let calls that ask for structured output by a JSON schema, or force a tool call, write "
        "nothing else; needs the extra `grammar`",
    )
    schema_in_prompt: bool = setting(
        True,
        "tell the model what form of answer a call asks for: the JSON schema of structured output, "
        "the tool that must be called. A paragraph of the system message says it, or of the first "
        "message of the user where there is none",
    )
    concurrency: int = setting(256, "episodes that run at once", at_least=1)
    engine: Literal["local", "vllm"] = setting(
        "local",
        "who samples: the base model in this process, or vLLM: servers in `engine_urls`, else one "
        "that the run starts and stops",
    )
    engine_urls: tuple[str, ...] = setting(
        (), "engine vllm: servers that run already, such as http://gpu-1:8000"
    )
    engine_timeout: float = setting(
        300.0, "engine vllm: deadline of one completion", unit="seconds", above=0, at_most=_YEAR
    )
    engine_patience: float = setting(
        300.0,
        "how long a vLLM server may take to start or to load adapters, and all of them be away "
        "before calls fail; how long a rollout worker may take to start",
        unit="seconds",
        above=0,
        at_most=_YEAR,
    )
    vllm_python: str = setting(
        "", "engine vllm: Python of the environment that has vLLM; none: this one"
    )
    vllm_args: tuple[str, ...] = setting(
        (), "engine vllm: more arguments of the server, such as --gpu-memory-utilization=0.5"
    )
    max_batch_size: int = setting(
        256,
        "completions that the local engine decodes at once; engine vllm: most at one server",
        at_least=1,
    )
    cache_gib: float = setting(
        4.0,
        "memory of the local engine for keys and values; calls that need more wait",
        unit="GiB",
        above=0,
        at_most=1_000_000,
    )
    episode_timeout: float = setting(
        600.0, "deadline of one episode", unit="seconds", above=0, at_most=_YEAR
    )
    reward_timeout: float = setting(
        60.0, "deadline of one reward call", unit="seconds", above=0, at_most=_YEAR
    )
    call_timeout: float | None = setting(
        None,
        "deadline of one model call, time in the queue included; one that misses it fails its "
        "episode; none: only the episode has one",
        unit="seconds",
        above=0,
        at_most=_YEAR,
    )
    rollout_workers: int = setting(
        0,
        "processes that run the episodes, on one machine or several, by Ray (extra `ray`); 0: this "
        "process does. `concurrency` is then what each of them runs at once",
        at_least=0,
        at_most=65_536,
    )
    ray_address: str | None = setting(
        None,
        "Ray cluster that has the rollout workers: host:port, or auto for the one on this machine; "
        "none: a Ray of the run's own",
    )
    worker_gpus: float = setting(
        0.0,
        "engine local: GPUs, or a share of one, that Ray reserves for a rollout worker; 0: it "
        "samples on a CPU",
        at_least=0,
        at_most=1024,
    )
    reward_concurrency: int = setting(64, "reward calls that run at once", at_least=1)
    max_failed_share: float = setting(
        0.5, "stop if a larger share of an iteration's episodes fails", at_least=0, at_most=1
    )
    fault_rewards: tuple[str, ...] = setting(
        (),
        "exceptions that are the policy's own fault, with the outcome that they earn, such as "
        "StructuredOutputError=-1 for every way in which structured output fails to parse; all "
        "others are failures, which nothing is learnt from",
    )
    reward_errors: Literal["stop", "drop"] = setting(
        "stop", "what a reward function that fails does: stop the run, or drop its episode"
    )

    staleness: int = setting(
        0,
        "asynchronous training: updates that the weights which sample may lag behind those that "
        "learn. The rollouts of so many iterations run ahead, beside the update; 0: rollout and "
        "update take turns",
        unit="updates",
        at_least=0,
    )
    filter_rounds: int = setting(
        0,
        "dynamic filtering: examples whose episodes all have one return are left out, and up to "
        "so many further rollouts fill their places; 0: no filtering",
        at_least=0,
    )

    # Learning
    level: Literal["token", "action"] = setting(
        "token", "what a PPO ratio covers: each token (MARFT-T) or the whole completion (MARFT-A)"
    )
    advantage: Literal["gae", "group"] = setting(
        "gae", "credit: GAE on the call graph with a critic, or relative to the example's group"
    )
    gamma: float = setting(
        1.0, "discount from a call to the calls that depend on it", at_least=0, at_most=1
    )
    lam: float = setting(0.95, "GAE lambda across calls", at_least=0, at_most=1)
    gamma_token: float = setting(1.0, "discount between tokens of a call", at_least=0, at_most=1)
    lam_token: float = setting(1.0, "GAE lambda between tokens of a call", at_least=0, at_most=1)
    normalize_advantages: bool = setting(
        True,
        "gae: each agent's advantages to mean 0, deviation 1; group: by the group's deviation",
    )
    group_by: Literal["example", "call"] = setting(
        "call",
        "group baseline over an example's episodes, or over the same call (node, turn) of them",
    )
    action_logprob: Literal["sum", "token", "word"] = setting(
        "token",
        "action level: how an action's log-prob is scaled (not, by its tokens, by its words)",
    )
    learning_rate: float = setting(1e-4, "AdamW step of the adapters", above=0)
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", "the adapters' step over the iterations: constant, or falling towards 0"
    )
    critic_learning_rate: float = setting(1e-3, "AdamW step of the value heads", above=0)
    critic_epochs: int = setting(
        8, "passes of a value head over an iteration's states; they are computed once", at_least=1
    )
    critic_warmup: int = setting(
        0, "first iterations that train the critics only", unit="iterations", at_least=0
    )
    weight_decay: float = setting(0.0, "AdamW weight decay of the adapters", at_least=0)
    epochs: int = setting(1, "passes over an iteration's calls", at_least=1)
    minibatches: int = setting(1, "optimizer steps in a pass", at_least=1)
    microbatch_tokens: int | None = setting(
        MICROBATCH_TOKENS,
        "padded tokens in one forward pass of the update, which bounds its memory; none: the "
        "largest that fits into memory_gib, measured in the first update",
        unit="tokens",
        at_least=1,
    )
    memory_gib: float | None = setting(
        None,
        "microbatch_tokens none: memory that this process may use in an update, on CUDA of its "
        "device; none: four fifths of what is free then",
        unit="GiB",
        above=0,
    )
    clip_ratio: float = setting(0.2, "PPO clip range of the ratio: 1 - c to 1 + c", above=0)
    clip_ratio_high: float | None = setting(
        None, "upper clip range where it differs from the lower one", above=0
    )
    value_clip: float | None = setting(
        0.2, "PPO clip range of the value; none: not clipped", above=0
    )
    value_loss: Literal["huber", "mse"] = setting("huber", "loss of the value heads")
    entropy_coef: float = setting(0.0, "weight of the entropy bonus", at_least=0)
    kl_coef: float = setting(0.0, "weight of the KL to the base model", at_least=0)
    kl_in: Literal["loss", "reward"] = setting(
        "loss", "whether the KL is a loss term or part of the reward"
    )
    target_kl: float | None = setting(
        None,
        "skip an agent's further epochs once its KL to the sampling policy passes this",
        above=0,
    )
    importance_cap: float | None = setting(
        _BY_STALENESS,
        "weigh tokens by the learner's over the engine's probability, at most this; for engines "
        "whose log-probs differ from the learner's, and for episodes of older weights",
        above=0,
    )
    update_order: Literal["simultaneous", "alternating", "sequential"] = setting(
        "simultaneous",
        "all agents in an iteration; one at a time; or all, one after another with HAPPO's factor",
    )
    alternate_every: int = setting(
        1, "alternating: iterations of one agent's turn", unit="iterations", at_least=1
    )
    alternate_order: tuple[str, ...] = setting(
        (), "alternating: agents in the order of their turns; none: as `inspect` lists them"
    )
    max_grad_norm: float = setting(1.0, "gradient clipping, per agent", above=0)

    # Health
    entropy_floor: float | None = setting(
        None, "an agent's entropy below this is a collapse", unit="nats per token", at_least=0
    )
    kl_ceiling: float | None = setting(
        None, "an agent's KL to the base above this is a collapse", unit="nats per token", above=0
    )
    return_floor: float | None = setting(
        None,
        "a mean return of five iterations below this share of its best is a collapse",
        at_least=0,
        at_most=1,
    )
    max_recoveries: int = setting(
        3, "collapses after which the last good checkpoint is put back; then it stops", at_least=0
    )
    recovery_rate: float = setting(
        0.5, "what a collapse multiplies learning rates with", above=0, at_most=1
    )
    early_stop: int = setting(
        0, "evaluations without a better held-out return that end training; 0: never", at_least=0
    )
    load_best: bool = setting(
        False, "end with the checkpoint of the best held-out return instead of the last one"
    )

    # Run
    seed: int = setting(
        0, "seed of data order, sampling and initial adapters", at_least=0, at_most=2**32 - 1
    )
    eval_every: int = setting(
        20,
        "iterations between evaluations; 0: only before and after; without held-out data: none",
        at_least=0,
    )
    eval_examples: int = setting(256, "held-out examples in an evaluation; 0: all", at_least=0)
    checkpoint_every: int = setting(
        20,
        "iterations between checkpoints; 0: only at the start, at the end and at the best held-out "
        "return",
        at_least=0,
    )
    keep_checkpoints: int = setting(3, "newest checkpoints that stay on disk", at_least=1)
    stop_timeout: float = setting(
        300.0,
        "SIGINT or SIGTERM: time in which the running step may finish before it is interrupted",
        unit="seconds",
        above=0,
        at_most=86_400,
    )

    # Tracking
    trackers: tuple[str, ...] = setting(
        (),
        "services that get the metrics too: tensorboard (files in the run folder), wandb, mlflow, "
        "trackio; none: nothing leaves the run folder",
    )
    tracker_project: str = setting("marft-graph", "project or experiment of the run at a tracker")

    def __post_init__(self) -> None:
        if isinstance(self.importance_cap, _ByStaleness):
            object.__setattr__(self, "importance_cap", _STALE_CAP if self.staleness else None)
        _check_fields(self)
        _check_trackers(self.trackers)
        fault_rewards_of(self.fault_rewards)
        if self.staleness and self.importance_cap is None:
            raise ConfigError(
                f"importance_cap is none, with staleness {self.staleness}; what older weights "
                f"sampled must be weighed: leave it out ({_STALE_CAP:g}), or give a number"
            )
        _check_learning(self)
        if self.memory_gib is not None and self.microbatch_tokens is not None:
            raise ConfigError(
                f"memory_gib is {self.memory_gib:g}, and microbatch_tokens {self.microbatch_tokens}"
                "; a limit of memory needs microbatch_tokens none, which finds what fits"
            )

    @property
    def episodes_per_iteration(self) -> int:
        """Episodes started in one iteration."""
        return self.examples_per_iteration * self.group_size

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Settings from a mapping such as a parsed YAML file; unknown names are refused."""
        _check_names(cls, values)
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> TrainConfig:
        """Settings from a YAML file."""
        return cls.from_mapping(read_yaml(path))

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some settings changed."""
        values = {**self.to_dict(), **changes}
        if self.importance_cap is None and "importance_cap" not in changes:
            del values["importance_cap"]  # staleness may change, which decides
        return type(self).from_mapping(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML or JSON (tuples become lists)."""
        values = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        values["per_node"] = {node: own.to_dict() for node, own in self.per_node.items()}
        return _plain(values)


def rollout_settings(config: TrainConfig, *, greedy: bool = False) -> RolloutSettings:
    """What a rollout takes of these settings, in training and in every evaluation.

    Args:
        config: the run's settings.
        greedy: take the most likely token, whatever else is set.
    """
    return RolloutSettings(
        concurrency=config.concurrency,
        episode_timeout=config.episode_timeout,
        call_timeout=config.call_timeout,
        reward_timeout=config.reward_timeout,
        reward_concurrency=config.reward_concurrency,
        temperature=0.0 if greedy else config.temperature,
        max_new_tokens=config.max_new_tokens,
        cap_new_tokens=config.cap_new_tokens,
        recursion_limit=config.recursion_limit,
        constrain_output=config.constrain_output,
        schema_in_prompt=config.schema_in_prompt,
        fault_rewards=fault_rewards_of(config.fault_rewards),
        reward_errors=config.reward_errors,
        # A node that is to be trained has no adapter yet: the trainer meets the error.
        new_nodes="freeze" if config.new_nodes == "freeze" else "stop",
    )


def fault_rewards_of(entries: tuple[str, ...]) -> dict[str, float]:
    """`fault_rewards` as names of exceptions and what they earn.

    Raises:
        ConfigError: an entry is no `Name=number`.

    >>> fault_rewards_of(("OutputParserException=-1",))
    {'OutputParserException': -1.0}
    """
    found = {}
    for entry in entries:
        name, _, value = entry.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not name.strip().isidentifier() or not abs(number) <= LARGEST_REWARD:
            raise ConfigError(
                f"fault_rewards has {entry!r}; each entry is the name of an exception's class and "
                "a number, such as OutputParserException=-1"
            )
        found[name.strip()] = number
    return found


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, is no YAML, or holds something other than a mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read settings from {path}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} must hold `name: value` lines, one for each setting")
    return values


def _check_names(cls: type[Any], values: Mapping[str, Any]) -> None:
    """Refuse names that are no fields of a class of settings."""
    known = [spec.name for spec in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"unknown setting {name!r}{hint} (see `marft-graph train --help`)")


def _check_fields(settings: Any) -> None:
    """Give every field the type it declares, and check its range."""
    hints = typing.get_type_hints(type(settings))
    for spec in dataclasses.fields(settings):
        value = _coerced(spec.name, getattr(settings, spec.name), hints[spec.name])
        object.__setattr__(settings, spec.name, value)
        _check_range(spec, value)


def _check_learning(config: TrainConfig) -> None:
    """Refuse settings that together let nothing be learnt."""
    if config.group_size == 1 and config.advantage == "group":
        raise ConfigError(
            "group_size is 1, with advantage group; an episode alone has nothing to be compared "
            "with, and every advantage would be 0: give at least 2, or advantage gae"
        )
    if config.group_size == 1 and config.filter_rounds:
        raise ConfigError(
            f"filter_rounds is {config.filter_rounds}, with group_size 1; a group of one has one "
            "return, so every example would be left out: give a group_size of at least 2"
        )
    if config.advantage == "gae" and 0 < config.iterations <= config.critic_warmup:
        raise ConfigError(
            f"critic_warmup is {config.critic_warmup}, with {config.iterations} iterations; no "
            "adapter would ever be trained: it must be below iterations"
        )


def _check_trackers(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"trackers has {name!r}; each is one of {', '.join(TRACKERS)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"trackers names one twice: {', '.join(names)}")


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _node_settings(values: Any) -> Mapping[str, NodeSettings]:
    """`per_node` as users write it: a mapping of nodes to mappings of settings."""
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"per_node is {values!r}; it must be a mapping such as {{planner: {{lora_rank: 8}}}}"
        )
    found = {}
    for node, own in values.items():
        if not isinstance(own, NodeSettings):
            if not isinstance(own, Mapping):
                raise ConfigError(
                    f"per_node: {node} is {own!r}; it must be a mapping such as {{lora_rank: 8}}"
                )
            try:
                _check_names(NodeSettings, own)
                own = NodeSettings(**own)
            except ConfigError as error:
                raise ConfigError(f"per_node: {node}: {error}") from None
        found[str(node)] = own
    return found


def _coerced(name: str, value: Any, hint: Any) -> Any:
    """The value in the type its field declares, or a ConfigError that says what is accepted."""
    finite = "a finite number"
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Mapping:
        return _node_settings(value)
    if origin is Literal:
        if value in args and isinstance(value, str):
            return value
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(map(str, args))}")
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        inner = next(arg for arg in args if arg is not type(None))
        return _coerced(name, value, inner)
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list | tuple) and all(isinstance(item, str) for item in items):
            return tuple(items)
        raise ConfigError(f"{name} is {value!r}; it must be a list of names")
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        # Compared as it is: a whole number may be too large for a float.
        return float(value) if -_LARGEST <= value <= _LARGEST else _reject(name, value, finite)
    if hint is float and isinstance(value, str):  # YAML reads 1e-4 as a string
        try:
            return _coerced(name, float(value), float)
        except ValueError:
            pass
    if hint is str and isinstance(value, str | Path):
        return str(value)
    words = {int: "a whole number", float: finite, bool: "true or false", str: "text"}
    return _reject(name, value, words[hint])


def accepted_range(spec: dataclasses.Field[Any]) -> str:
    """What a setting's numbers may be, in words; empty where all are accepted.

    >>> [accepted_range(spec) for spec in dataclasses.fields(TrainConfig) if spec.name == "lam"]
    ['between 0 and 1']
    """
    low, high, above = (spec.metadata[key] for key in ("at_least", "at_most", "above"))
    if low is not None and high is not None:
        return f"between {low} and {high}"
    bounds = (("above", above), ("at least", low), ("at most", high))
    return ", ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)


def _reject(name: str, value: Any, accepted: str) -> typing.NoReturn:
    raise ConfigError(f"{name} is {value!r}; it must be {accepted}")


def _check_range(spec: dataclasses.Field[Any], value: Any) -> None:
    if value is None or isinstance(value, str | bool | tuple | Mapping):
        return
    low, high, above = (spec.metadata[key] for key in ("at_least", "at_most", "above"))
    if (
        (above is None or value > above)
        and (low is None or value >= low)
        and (high is None or value <= high)
    ):
        return
    shown = int(value) if value == int(value) else value
    _reject(spec.name, shown, accepted_range(spec))
