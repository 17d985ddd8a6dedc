"""Labels: what the reward compares with must not get into the graph by a channel of its name.

An example often has the right answer under the name of the channel that an agent writes its own
answer to. Handed over with the rest of the example, it would be in the state that every agent
reads, and where no agent writes an answer, the reward would find its own. So, without `inputs=` and
in a graph without an input schema of its own:

1. A key that the reward names and a node writes is withheld, which is said.
2. Where a node reads such a key before any node can have written it, nothing is guessed: it is an
   error that asks for `inputs=`.
3. Where a node's code does not show what it writes, or the reward's does not show which keys of the
   example it reads, the key is handed over, which is said as well.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from langgraph.constants import START
from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel

from marft_graph.errors import DatasetError
from marft_graph.graph.channels import collects, input_channels, output_channels, state_channels
from marft_graph.graph.source import read_source
from marft_graph.graph.state_use import state_use
from marft_graph.rollout.reward_keys import keys_read
from marft_graph.rollout.rewards import RewardFunction

logger = logging.getLogger(__name__)

_WAYS_OUT = (
    "say what the graph is given by `inputs=` (a list of keys, or a function from example to "
    "input), or compile it with an input_schema"
)


@dataclass(frozen=True, slots=True)
class Labels:
    """Keys of examples that are input channels, which the reward names and a node writes."""

    writers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By key, the nodes whose code says that they write it: it is a result, never handed over."""
    readers: Mapping[str, str] = field(default_factory=dict)
    """By such a key, a node that reads it before any node has written it."""
    doubtful: frozenset[str] = frozenset()
    """A node's code does not say what it writes: they are handed over."""
    unnamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By a key that nodes write, these; the reward may read any key: it is handed over."""

    @property
    def withheld(self) -> frozenset[str]:
        """Keys that the graph is not given."""
        return frozenset(self.writers)

    def refuse_read(self, examples: Iterable[Mapping[str, Any]]) -> None:
        """Refuse to guess where a node needs what would be withheld.

        Raises:
            DatasetError: names the key and the node.
        """
        keys = {key for example in examples for key in example}
        for key in sorted(self.readers.keys() & keys):
            raise DatasetError(
                f"the examples have {key!r}. The reward names it and {self._writers_of(key)}, as "
                f"with a label; but node {self.readers[key]!r} reads it before any node has "
                f"written it: {_WAYS_OUT}"
            )

    def explained(self, text: str, cause: BaseException | None, example: Mapping[str, Any]) -> str:
        """An error's text, with the reason where its cause names a key that was withheld."""
        words = set(re.findall(r"\w+", str(cause)))
        named = sorted(self.withheld & words & set(example))
        if not named:
            return text
        return (
            f"{text} (the example's {_listed(named)} was withheld from the graph: the reward names "
            f"it and {self._writers_of(named[0])}, as with a label; if it is none, {_WAYS_OUT})"
        )

    def told(self, keys: Collection[str] | None = None) -> list[str]:
        """What a user is told of the keys that examples have, a line each.

        Args:
            keys: of the examples; None: not known, and what only may be read is left out.

        >>> Labels({"answer": ("solver",)}).told(["question"])
        []
        """
        known = self.withheld | self.doubtful
        keys = known if keys is None else (known | self.unnamed.keys()) & set(keys)
        lines = [
            f"the examples' {key!r} is for the reward alone and not given to the graph: the reward "
            f"names it and {self._writers_of(key)}. If the app needs it, {_WAYS_OUT}"
            for key in sorted(self.withheld & keys)
        ]
        if named := sorted(self.doubtful & keys):
            lines.append(
                f"the reward names {_listed(named)} of the examples, which the graph is given as "
                "well; a node's code does not show whether it writes a channel of that name. If it "
                f"is a label, agents can read it: {_WAYS_OUT}"
            )
        lines += [
            f"the reward's code does not show which keys of the examples it reads; the graph is "
            f"given {key!r}, and {self._writers_of(key)}. If the reward compares with it, agents "
            f"can read it: {_WAYS_OUT}"
            for key in sorted(self.unnamed.keys() & keys)
        ]
        return lines

    def _writers_of(self, key: str) -> str:
        nodes = self.writers.get(key) or self.unnamed[key]
        return f"node{'s' * (len(nodes) > 1)} {_listed(nodes)} write{'s' * (len(nodes) == 1)} it"


_said: set[str] = set()


def say_once(lines: Iterable[str]) -> None:
    """Log lines that this process has not logged yet."""
    for line in lines:
        if line not in _said:
            _said.add(line)
            logger.warning(line)


def labels_of(graph: Pregel[Any, Any, Any, Any], reward: RewardFunction | None) -> Labels:
    """The keys that would leak.

    An input schema apart from the state is taken at its word, and so are channels that collect what
    is written to them, such as messages. Without a reward there is no label.
    """
    if reward is None or not isinstance(graph, CompiledStateGraph):
        return Labels()
    if graph.builder.input_schema is not graph.builder.state_schema:
        return Labels()
    keys = {key for key in input_channels(graph) if not collects(graph.channels[key])}
    read = keys_read(reward)
    named = keys if read.names is None else keys & read.names
    others = keys - named if read.may_read_others else set[str]()
    if not named and not others:
        return Labels()
    plain, possible = _written(graph)
    writers = {key: tuple(plain[key]) for key in sorted(named & plain.keys())}
    return Labels(
        writers=writers,
        readers=_first_readers(graph, writers),
        doubtful=frozenset(named & possible - plain.keys()),
        unnamed={key: tuple(plain[key]) for key in sorted(others & plain.keys())},
    )


def _first_readers(
    graph: Pregel[Any, Any, Any, Any], writers: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """By key, a node that surely reads it and that runs before any of those that write it."""
    following: dict[str, list[str]] = {}
    for edge in graph.get_graph().edges:
        following.setdefault(edge.source, []).append(edge.target)
    fields = state_channels(graph)
    found: dict[str, str] = {}
    for key, nodes in writers.items():
        reached, waiting = set(), list(following.get(START, ()))
        while waiting:
            name = waiting.pop()
            if name in reached or name not in graph.nodes:
                continue
            reached.add(name)
            bound = graph.nodes[name].bound
            if not isinstance(bound, Pregel) and key in state_use(bound, fields).must_read:
                found.setdefault(key, name)
            if name not in nodes:
                waiting += following.get(name, ())
    return found


def _written(graph: Pregel[Any, Any, Any, Any]) -> tuple[dict[str, list[str]], set[str]]:
    """Channels that nodes' code says they write, with the nodes; and those that one may write."""
    plain: dict[str, list[str]] = {}
    possible: set[str] = set()
    for name, node in graph.nodes.items():
        if name.startswith("__"):
            continue
        if isinstance(node.bound, Pregel):
            inner_plain, inner_possible = _written(node.bound)
            leaving = output_channels(node.bound)
            for key in inner_plain.keys() & leaving:
                plain.setdefault(key, []).append(name)
            possible |= inner_possible & leaving
            continue
        writes = read_source(node.bound).may_write
        if writes is None:
            possible |= state_channels(graph)
        else:
            for key in writes:
                plain.setdefault(key, []).append(name)
    return plain, possible


def _listed(keys: Collection[str]) -> str:
    return " and ".join(map(repr, keys))
