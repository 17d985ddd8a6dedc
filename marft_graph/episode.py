"""What one run of the app leaves behind: `Call`, `Episode` and `Reward`.

These are the contracts between rollout (which writes them), learning (which reads ids, log-probs,
parents and rewards) and the run folder (which stores them). They hold plain Python values only,
so that an episode can be pickled, written to parquet, or made by hand in a test.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from marft_graph.errors import RewardError
from marft_graph.names import agent_path

FinishReason = Literal["stop", "length"]
LARGEST_REWARD = 1e12
"""Rewards work up to this size: advantages are computed in float64, which then tells returns apart
that differ by a tenth, and squares of the float32 numbers of losses and gradients stay finite."""


class Failure(StrEnum):
    """What kind of thing made an episode fail; `Episode.status` and `error` have the details."""

    APP = "app"
    """An exception of the app, or of an engine under it."""
    TIMEOUT = "timeout"
    """The episode's or a call's deadline."""
    INTERRUPT = "interrupt"
    """It waits for a person."""
    REWARD = "reward"
    """The reward function failed."""


class SetAside(StrEnum):
    """Why a model call that a node made is not among its episode's `calls`."""

    RETRIED = "retried"
    """It belongs to an attempt that failed and was made again."""
    UNANSWERED = "unanswered"
    """It got no answer."""
    OWN_MODEL = "own_model"
    """The node is not trained."""
    UNDECIDED = "undecided"
    """The app's own model was asked by a node that nobody had decided on."""


@dataclass(frozen=True, slots=True)
class Call:
    """One generation by one node: what was sampled is what is trained.

    `prompt_ids`, `completion_ids` and `logprobs` are stored when sampled and never rebuilt from
    text. `parents` are indices of the episode's calls that this call's prompt depends on; they are
    always smaller than `index`.
    """

    agent: str
    """Name of the adapter that answered."""
    node: str
    """Full node path in the graph, without task ids: `research_team/writer/agent`."""
    index: int
    """Position in `Episode.calls` (topological order)."""
    parents: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """What was sampled, the end-of-sequence token included where the model wrote one."""
    logprobs: tuple[float, ...]
    """Natural log-probability of each completion token under the actual sampling distribution."""
    finish_reason: FinishReason
    adapter_version: int
    temperature: float = 1.0
    """Sampling temperature of this call; 0 means greedy (`logprobs` are then those at 1)."""
    reward: float = 0.0
    """The call's own reward, beside the episode's outcome."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """The prompt and the answer as role/content dicts, for people; never re-tokenised."""
    task_id: str = ""
    """LangGraph task that made the call; calls of one task share it."""
    step: int = 0
    """Superstep of the (innermost) graph in which the call was made."""
    seed: int = 0
    tools: tuple[Mapping[str, Any], ...] = ()
    """Schemas of the tools that the call offered, in OpenAI form."""
    usage: tuple[int, int] | None = None
    """Prompt and completion tokens as an API counted them, where there are no token ids."""
    grammar: str = ""
    """JSON schema that constrained the sampling, as text; empty: nothing did."""
    started: float = 0.0
    """Seconds since the episode started."""
    seconds: float = 0.0
    """Wall-clock time from submission to completion."""

    @property
    def tokens(self) -> tuple[int, int]:
        """How many tokens were read and written."""
        return self.usage or (len(self.prompt_ids), len(self.completion_ids))

    def __post_init__(self) -> None:
        if len(self.logprobs) != len(self.completion_ids):
            raise ValueError(
                f"call {self.index} of {self.node!r}: {len(self.completion_ids)} completion tokens "
                f"but {len(self.logprobs)} log-probs; there is exactly one for each token"
            )
        if any(parent < 0 or parent >= self.index for parent in self.parents):
            raise ValueError(
                f"call {self.index} of {self.node!r}: parents {self.parents} must be indices of "
                f"earlier calls (0 to {self.index - 1})"
            )


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward with both parts: the team's outcome and the nodes' own rewards."""

    outcome: float = 0.0
    nodes: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict, repr=False)
    """What the reward was made from, by name, for the metrics; adds nothing to the reward."""

    def __post_init__(self) -> None:
        named = [("outcome", self.outcome), *self.nodes.items(), *self.parts.items()]
        for name, value in named:
            if not isinstance(value, bool | int | float) or not _is_finite(value):
                raise RewardError(
                    f"reward for {name!r} is {value!r}; a reward is one finite number"
                )
            check_reward_size(value, f"reward for {name!r} is")


def _is_finite(value: float) -> bool:
    return -sys.float_info.max <= value <= sys.float_info.max  # of whole numbers of any size


def check_reward_size(value: float, said: str) -> None:
    """Refuse a reward that is too large to learn from.

    Raises:
        RewardError: it is outside of ±`LARGEST_REWARD`; the message begins with `said`.
    """
    if abs(value) > LARGEST_REWARD:
        raise RewardError(
            f"{said} {value:g}; rewards are learnt from between {-LARGEST_REWARD:g} and "
            f"{LARGEST_REWARD:g}: divide by a constant"
        )


@dataclass(frozen=True, slots=True)
class Episode:
    """One run of the app on one example."""

    example: Mapping[str, Any]
    calls: tuple[Call, ...]
    """In topological order: a call's parents come before it."""
    outcome_reward: float = 0.0
    """The team's reward."""
    node_rewards: Mapping[str, float] = field(default_factory=dict)
    """Own rewards by node path, as the reward function gave them (already in `Call.reward`)."""
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    """`Reward.parts`: the value of each reward function before its weight."""
    state: Any = None
    """Final state of the graph; None where the episode failed."""
    status: str = "ok"
    """`ok`, or `failed: REASON` with a short reason that episodes can be counted by."""
    error: str = ""
    """Where the episode failed: the full message, with the node. An episode that is `ok` and has
    one ended with an error that is the policy's own fault, and earned what was set for it."""
    failure: Failure | None = None
    """What kind of thing made it fail; None where it did not."""
    failed_node: str = ""
    """Node path of the innermost node that an exception left; empty where that was none."""
    set_aside: tuple[tuple[str, SetAside], ...] = ()
    """Node paths of the model calls that are not in `calls`, and why: with `calls` these are all
    calls that the app's nodes made."""
    seed: int = 0
    example_index: int = 0
    """Position of the example in the list given to the rollout: episodes of one example share it
    and so form a group."""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the episode ran to its end and may be trained on."""
        return self.status == "ok"

    @property
    def total_reward(self) -> float:
        """Outcome plus every call's own reward: the episode's return at gamma 1."""
        return self.outcome_reward + sum(call.reward for call in self.calls)


def observations(episodes: Iterable[Episode]) -> set[tuple[str, str]]:
    """Pairs (i, j) of nodes of which i was seen to read what j wrote, as agent paths."""
    return {
        (agent_path(call.node), agent_path(episode.calls[parent].node))
        for episode in episodes
        for call in episode.calls
        for parent in call.parents
    }
