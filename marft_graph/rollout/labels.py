"""Labels: what the reward compares with must not get into the graph by a channel of its name.

An example often has the right answer under the name of the channel that an agent writes its own
answer to. Handed over with the rest of the example, it would be in the state that every agent
reads, and where no agent writes an answer, the reward would find its own.
"""

from __future__ import annotations

import dis
import re
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel

from marft_graph.graph.channels import collects, input_channels, output_channels, state_channels
from marft_graph.graph.roles import codes, reachable
from marft_graph.graph.source import read_source
from marft_graph.rollout.rewards import CombinedReward, RewardFunction

_WAYS_OUT = (
    "compile the graph with an input_schema that says what its input is, or give `inputs=`, a "
    "function from example to input"
)


@dataclass(frozen=True, slots=True)
class Labels:
    """Keys of examples that are input channels, which the reward names and a node writes."""

    withheld: frozenset[str] = frozenset()
    """A node's code says that it writes them: they are results, and never handed over."""
    doubtful: frozenset[str] = frozenset()
    """A node's code does not say what it writes: they are handed over."""

    def explained(self, text: str, cause: BaseException | None, example: Mapping[str, Any]) -> str:
        """An error's text, with the reason where its cause names a key that was withheld."""
        words = set(re.findall(r"\w+", str(cause)))
        named = sorted(self.withheld & words & set(example))
        if not named:
            return text
        return f"{text} (the example's {_listed(named)} was withheld from the graph: {_REASON})"

    def warning(self, keys: Collection[str]) -> str:
        """What to say of doubtful keys that the examples have; empty where they have none."""
        named = sorted(self.doubtful & set(keys))
        if not named:
            return ""
        return (
            f"the reward names {_listed(named)} of the examples, which the graph is given as well; "
            "a node's code does not show whether it writes a channel of that name. If it is a "
            f"label, agents can read it: {_WAYS_OUT}"
        )


_REASON = f"the reward names it and a node writes it, as with a label; if it is none, {_WAYS_OUT}"


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
    names = _names_in(reward)
    keys &= keys if names is None else names
    if not keys:
        return Labels()
    plain, possible = _written(graph)
    return Labels(frozenset(keys & plain), frozenset(keys & possible - plain))


def _written(graph: Pregel[Any, Any, Any, Any]) -> tuple[set[str], set[str]]:
    """State channels that some node's code says it writes, and those that one may write."""
    plain: set[str] = set()
    possible: set[str] = set()
    for name, node in graph.nodes.items():
        if name.startswith("__"):
            continue
        if isinstance(node.bound, Pregel):
            inner_plain, inner_possible = _written(node.bound)
            leaving = output_channels(node.bound)
            plain |= inner_plain & leaving
            possible |= inner_possible & leaving
            continue
        writes = read_source(node.bound).may_write
        if writes is None:
            possible |= state_channels(graph)
        else:
            plain |= writes
    return plain, possible


def _names_in(reward: RewardFunction) -> frozenset[str] | None:
    """Texts in a reward's code and what it calls or holds, but for mere keys of the state.

    None where there is no code to read.
    """
    parts = [p.function for p in reward.parts] if isinstance(reward, CombinedReward) else [reward]
    names: set[str] = set()
    for part in parts:
        found = list(_reachable(part))
        functions = [value for value in found if isinstance(value, types.FunctionType)]
        if not functions:
            return None
        constants = [[c.co_consts for c in codes(f.__code__)] for f in functions if f is not part]
        names.update(_texts([found, constants]))
        if isinstance(part, types.FunctionType):
            own, *inner = codes(part.__code__)
            names.update(_texts([c.co_consts for c in inner]))
            names.update(set(_texts(own.co_consts)) - _keys_of_state(own))
    return frozenset(names)


def _keys_of_state(code: types.CodeType) -> set[str]:
    """Texts that a reward uses as keys of its second argument, the state, and for nothing else."""
    if code.co_argcount < 2:
        return set()
    state = code.co_varnames[1]
    of_state: set[str] = set()
    others: set[str] = set()
    before: list[dis.Instruction] = []
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_CONST":
            if before and before[-1].argval == "get":  # state.get("key")
                before.pop()
            is_of_state = bool(before) and _loads(before[-1], state)
            (of_state if is_of_state else others).update(_texts(step.argval))
        before.append(step)
    return of_state - others


def _loads(step: dis.Instruction, name: str) -> bool:
    """Whether an instruction leaves a variable's value on top of the stack."""
    last = step.argval[-1] if isinstance(step.argval, tuple) else step.argval  # two at once
    return step.opname.startswith("LOAD_FAST") and last == name


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple | set | frozenset):
        for part in value:
            yield from _texts(part)


def _reachable(value: Any) -> Iterator[Any]:
    """What a value's code can call or hold, functions named as `module.function` included."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        for found in reachable(waiting.pop(), seen):
            yield found
            if isinstance(found, types.FunctionType):
                waiting += _of_modules(found)


def _of_modules(function: types.FunctionType) -> Iterator[types.FunctionType]:
    for code in codes(function.__code__):
        held = [function.__globals__.get(name) for name in code.co_names]
        for module in held:
            if isinstance(module, types.ModuleType):
                named = [vars(module).get(name) for name in code.co_names]
                yield from (value for value in named if isinstance(value, types.FunctionType))


def _listed(keys: Collection[str]) -> str:
    return " and ".join(map(repr, keys))
