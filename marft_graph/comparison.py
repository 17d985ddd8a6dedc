"""Policies side by side before anyone deploys one: the base, exports, the app's own models.

Every policy runs the same app on the same examples with the same seeds, so that returns are
compared pair by pair. Trains nothing; `run.comparison_page` shows what was found.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marft_graph.agents import agents_of
from marft_graph.config import TrainConfig
from marft_graph.data import as_examples
from marft_graph.deploy.manifest import read_manifest
from marft_graph.engine.routing import local_engine
from marft_graph.episode import Call, Episode
from marft_graph.errors import ConfigError, EpisodesFailedError
from marft_graph.evaluation import (
    Evaluation,
    export_episodes,
    held_out_episodes,
    summarize,
)
from marft_graph.graph.compile import as_compiled, compile_with
from marft_graph.graph.flex_mg import FlexMG
from marft_graph.names import agent_path
from marft_graph.policy.team import Team
from marft_graph.rollout.inputs import AppInputs, InputFunction, Reviewer
from marft_graph.rollout.rewards import Rewards
from marft_graph.rollout.settings import check_at_least
from marft_graph.run.paired import PairedDifference, paired_difference

BASE = "base"
"""The untrained base model."""
OWN = "own"
"""The app's own models."""
Inputs = InputFunction | None
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Price:
    """What an API asks for a million tokens, in any one currency."""

    prompt: float
    completion: float


@dataclass(frozen=True, slots=True)
class NodeFigures:
    """What one node did, over the episodes that did not fail."""

    calls_per_episode: float
    prompt_tokens: float
    """Mean of a call."""
    completion_tokens: float
    """Mean of a call."""
    truncated_share: float
    """Calls that ran into the token limit."""
    seconds: float
    """Mean of a call, while `concurrency` episodes ran at once."""


@dataclass(frozen=True, slots=True)
class PolicyFigures:
    """How one policy did."""

    name: str
    evaluation: Evaluation
    nodes: Mapping[str, NodeFigures]
    tokens_per_episode: tuple[float, float]
    """Prompt and completion tokens of an episode."""
    seconds_per_episode: float
    """From start to end, while `concurrency` episodes ran at once."""
    cost_per_episode: float | None
    """At the policy's price; None where none was given."""


@dataclass(frozen=True, slots=True)
class ChangedExample:
    """An example that one policy did better than the reference, or worse."""

    policy: str
    difference: float
    before: Episode
    after: Episode


@dataclass(frozen=True, slots=True)
class Comparison:
    """Several policies on the same examples and seeds."""

    policies: tuple[PolicyFigures, ...]
    against: str
    """Name of the policy that the others are compared with."""
    differences: Mapping[str, PairedDifference]
    """By policy: the difference to `against`, example by example."""
    better: tuple[ChangedExample, ...] = field(repr=False)
    worse: tuple[ChangedExample, ...] = field(repr=False)
    greedy: bool

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {
            "policies": [_plain(policy) for policy in self.policies],
            "against": self.against,
            "differences": {
                name: {**dataclasses.asdict(found), "verdict": found.verdict}
                for name, found in self.differences.items()
            },
            "better": [_shown(changed) for changed in self.better],
            "worse": [_shown(changed) for changed in self.worse],
            "greedy": self.greedy,
        }


def compare(
    graph: Any,
    policies: Mapping[str, str | Path],
    dataset: Any,
    *,
    reward: Rewards,
    config: TrainConfig,
    inputs: Inputs = None,
    context: Any = None,
    configurable: Any = None,
    store: Any = None,
    on_interrupt: Reviewer | None = None,
    against: str | None = None,
    prices: Mapping[str, Price] | None = None,
    episodes_per_example: int = 1,
    greedy: bool = False,
    base_model: str | None = None,
    own_concurrency: int = 16,
) -> Comparison:
    """Run policies on the first `config.eval_examples` held-out examples (0: all) and compare.

    Args:
        graph: the app, unchanged.
        policies: by a name of your own: an export folder, `"base"` for the untrained base model, or
            `"own"` for the app's own models (which are asked, and cost what they cost).
        dataset: held-out examples.
        reward: as in training.
        config: its rollout settings, and for the base its model settings.
        inputs: a list of the examples' keys that the graph is given, or a function that makes its
            input from an example.
        context: what nodes find as `runtime.context`: a value, or a function of the example.
        configurable: values of `config["configurable"]`, likewise.
        store: what an episode's store holds at its beginning, likewise; see `run_episodes`.
        on_interrupt: `reviewer(example, state, interrupt)` answers the app's interrupts.
        against: the policy that the others are compared with; by default the first.
        prices: of a million tokens, by policy.
        episodes_per_example: several lower the noise; an example still counts once.
        greedy: take the most likely token instead of sampling (own models keep their settings).
        base_model: where the exports' base model is now.
        own_concurrency: episodes of the app's own models that run at once; APIs limit rates.

    Raises:
        ConfigError: no policy, `against` or a price names one that is not compared, or a number
            is out of range.
        ExportError, ModelError, DatasetError, EpisodesFailedError, RewardError: as in evaluation.
    """
    prices = dict(prices or {})
    app_inputs = AppInputs(
        inputs=inputs,
        context=context,
        configurable=configurable,
        store=store,
        on_interrupt=on_interrupt,
    )
    check_at_least("episodes_per_example", episodes_per_example, 1)
    check_at_least("own_concurrency", own_concurrency, 1)
    reference = _reference(policies, against, prices)
    app = as_compiled(graph)
    examples = as_examples(dataset, "dataset", config.eval_examples or None)
    manifests = [read_manifest(p) for p in policies.values() if str(p) not in (BASE, OWN)]
    if manifests:  # the base gets the limits of the adapters that it is compared with
        config = config.replace(**manifests[0].rollout)
    exported = dict.fromkeys(node for manifest in manifests for node in manifest.nodes)
    frozen = {node for manifest in manifests for node in (*manifest.nodes, *manifest.frozen)}
    nodes = tuple(exported)
    if not nodes:
        game = _trained_game(app, examples, app_inputs, config)
        nodes, frozen = game.agents, set(game.frozen)
    episodes: dict[str, list[Episode]] = {}
    for name, source in policies.items():
        options: dict[str, Any] = {
            "reward": reward,
            "config": config,
            "given": app_inputs,
            "frozen": sorted(frozen),
            "greedy": greedy,
            "group_size": episodes_per_example,
        }
        if str(source) == OWN:
            options["config"] = config.replace(concurrency=min(own_concurrency, config.concurrency))
            episodes[name] = held_out_episodes(app, examples, engine=None, nodes=nodes, **options)
        elif str(source) == BASE:
            episodes[name] = _base_episodes(app, examples, nodes, config, base_model, options)
        else:
            episodes[name] = export_episodes(
                app, source, examples, base_model=base_model, **options
            )
    figures = tuple(_figures(name, episodes[name], prices.get(name), greedy) for name in policies)
    others = [name for name in policies if name != reference]
    changed = sorted(
        (c for name in others for c in _changes(name, episodes[reference], episodes[name])),
        key=lambda c: -c.difference,
    )
    return Comparison(
        policies=figures,
        against=reference,
        differences={name: differences(episodes[reference], episodes[name]) for name in others},
        better=tuple(c for c in changed if c.difference > 0)[:_SHOWN],
        worse=tuple(c for c in reversed(changed) if c.difference < 0)[:_SHOWN],
        greedy=greedy,
    )


def _reference(
    policies: Mapping[str, str | Path], against: str | None, prices: Mapping[str, Price]
) -> str:
    known = ", ".join(policies)
    if not policies:
        raise ConfigError("there is no policy to compare; give at least one")
    for name in prices:
        if name not in policies:
            raise ConfigError(f"a price names {name!r}, which is not compared; there are {known}")
    if against is not None and against not in policies:
        raise ConfigError(f"against names {against!r}, which is not compared; there are {known}")
    return against or next(iter(policies))


def _trained_game(
    app: Any, examples: Sequence[Mapping[str, Any]], app_inputs: AppInputs, config: TrainConfig
) -> FlexMG:
    """The nodes that would be trained, found as the trainer finds them."""
    shown = [examples[i] for i in range(min(8, len(examples)))]
    return compile_with(app, shown, app_inputs).training(config.nodes)


def _base_episodes(
    app: Any,
    examples: Sequence[Mapping[str, Any]],
    nodes: Sequence[str],
    config: TrainConfig,
    base_model: str | None,
    options: dict[str, Any],
) -> list[Episode]:
    """A fresh adapter changes nothing: a team of them is the base model."""
    own = {
        node: dataclasses.replace(settings, start_from=None)
        for node, settings in config.per_node.items()
        if node in nodes
    }
    fresh = config.replace(
        start_from=None,
        per_node={node: settings.to_dict() for node, settings in own.items()},
        base_model=base_model or config.base_model,
    )
    agents = agents_of(nodes, fresh)
    engine = local_engine(Team.load(agents, fresh), config)
    adapters = {node: agent.name for agent in agents for node in agent.nodes}
    try:
        return held_out_episodes(
            app, examples, engine=engine, nodes=nodes, adapters=adapters, **options
        )
    finally:
        engine.close()


def _figures(
    name: str, episodes: Sequence[Episode], price: Price | None, greedy: bool
) -> PolicyFigures:
    try:
        evaluation = summarize(episodes, greedy=greedy)
    except EpisodesFailedError as error:
        raise EpisodesFailedError(f"{name}: {error}") from error
    whole = [episode for episode in episodes if episode.ok]
    calls: dict[str, list[Call]] = {}
    for call in (call for episode in whole for call in episode.calls):
        calls.setdefault(agent_path(call.node), []).append(call)
    read, written = (
        statistics.fmean(sum(call.tokens[side] for call in e.calls) for e in whole)
        for side in (0, 1)
    )
    cost = None if price is None else (read * price.prompt + written * price.completion) / 1e6
    return PolicyFigures(
        name=name,
        evaluation=evaluation,
        nodes={node: _node_figures(own, len(whole)) for node, own in sorted(calls.items())},
        tokens_per_episode=(read, written),
        seconds_per_episode=statistics.fmean(episode.seconds for episode in whole),
        cost_per_episode=cost,
    )


def _node_figures(calls: Sequence[Call], episodes: int) -> NodeFigures:
    return NodeFigures(
        calls_per_episode=len(calls) / episodes,
        prompt_tokens=statistics.fmean(call.tokens[0] for call in calls),
        completion_tokens=statistics.fmean(call.tokens[1] for call in calls),
        truncated_share=sum(call.finish_reason == "length" for call in calls) / len(calls),
        seconds=statistics.fmean(call.seconds for call in calls),
    )


def _pairs(before: Sequence[Episode], after: Sequence[Episode]) -> list[tuple[Episode, Episode]]:
    """Episodes of the same example and seed, neither of them failed."""
    old = {(e.example_index, e.seed): e for e in before if e.ok}
    keyed = [((e.example_index, e.seed), e) for e in after if e.ok]
    return [(old[key], episode) for key, episode in keyed if key in old]


def differences(before: Sequence[Episode], after: Sequence[Episode]) -> PairedDifference:
    """The paired difference of two policies' episodes, `after` minus `before`.

    An example counts once, however many episodes it had: their noise is not independent.

    Raises:
        EpisodesFailedError: no example was finished by both.
    """
    by_example: dict[int, list[float]] = {}
    for old, new in _pairs(before, after):
        gain = new.total_reward - old.total_reward
        by_example.setdefault(new.example_index, []).append(gain)
    if not by_example:
        raise EpisodesFailedError(
            "no example was finished by both policies: there is nothing to compare"
        )
    return paired_difference([statistics.fmean(gains) for gains in by_example.values()])


def _changes(
    name: str, before: Sequence[Episode], after: Sequence[Episode]
) -> list[ChangedExample]:
    return [
        ChangedExample(name, new.total_reward - old.total_reward, old, new)
        for old, new in _pairs(before, after)
    ]


def _plain(policy: PolicyFigures) -> dict[str, Any]:
    values = dataclasses.asdict(policy)
    values["evaluation"]["returns"] = list(policy.evaluation.returns)
    return values


def _shown(changed: ChangedExample) -> dict[str, Any]:
    def told(episode: Episode) -> dict[str, Any]:
        calls = [
            {"node": call.node, "answer": dict(call.messages[-1]) if call.messages else {}}
            for call in episode.calls
        ]
        return {"return": episode.total_reward, "calls": calls}

    return {
        "policy": changed.policy,
        "difference": changed.difference,
        "example": dict(changed.before.example),
        "before": told(changed.before),
        "after": told(changed.after),
    }
