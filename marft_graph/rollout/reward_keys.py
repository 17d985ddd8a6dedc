"""Which keys of an example a reward reads, as far as its code tells.

Texts in its code, in what it calls and in what it holds are keys that it may read. Whether it may
read others too is told apart: it hands the example on, looks through it, or makes keys. It knows
neither graphs nor channels.
"""

from __future__ import annotations

import dis
import enum
import functools
import inspect
import operator
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from marft_graph.graph.objects import cell_values
from marft_graph.graph.roles import codes, reachable
from marft_graph.rollout.rewards import CombinedReward, RewardFunction

_READS_A_KEY = ("get", "pop", "setdefault", "__getitem__")
_LOADS = ("LOAD_FAST", "LOAD_GLOBAL", "LOAD_DEREF")
_ABSENT = object()


class _Use(enum.Enum):
    """What code does with an example."""

    TEXT = "reads a key that is a text of the code"
    OPEN = "may read any key"


@dataclass(frozen=True, slots=True)
class KeysRead:
    """Keys that a reward may read of an example."""

    names: frozenset[str] | None
    """Texts that its code has; None where there is no code to read."""
    may_read_others: bool
    """Whether its code leaves open which keys it reads."""


def keys_read(reward: RewardFunction) -> KeysRead:
    """What the code of a reward says of the keys that it reads.

    >>> keys = keys_read(lambda example, state: state["text"] == example["gold"])
    >>> sorted(keys.names), keys.may_read_others
    (['gold'], False)
    >>> keys_read(lambda example, state: example == state).may_read_others
    True
    """
    parts = [p.function for p in reward.parts] if isinstance(reward, CombinedReward) else [reward]
    names: set[str] = set()
    may_read_others = False
    for part in parts:
        found = list(_reachable(part))
        functions = [value for value in found if isinstance(value, types.FunctionType)]
        if not functions:
            return KeysRead(None, may_read_others=True)
        entry = _Entry.of(part)
        is_open, resolved = (True, set[str]()) if entry is None else entry.uses()
        may_read_others |= is_open
        names |= resolved
        constants = [[c.co_consts for c in codes(f.__code__)] for f in functions if f is not part]
        getters = [f.__reduce__()[1] for f in found if isinstance(f, operator.itemgetter)]
        names.update(_texts([found, constants, getters]))
        if isinstance(part, types.FunctionType):
            own, *inner = codes(part.__code__)
            names.update(_texts([c.co_consts for c in inner]))
            names.update(set(_texts(own.co_consts)) - _keys_of_state(own))
        if is_open:
            names.update(name for function in functions for name in _fields(function))
    return KeysRead(frozenset(names), may_read_others)


@dataclass(frozen=True, slots=True)
class _Entry:
    """The Python function that gets the example, and the name that the example has in it."""

    function: types.FunctionType
    example: str
    holder: Any
    """What the function's first parameter holds, for a method; else nothing."""

    @classmethod
    def of(cls, reward: Any) -> _Entry | None:
        """Where the example arrives; None where the code does not show it."""
        position, holder = 0, _ABSENT
        while isinstance(reward, functools.partial):
            position += len(reward.args)
            reward = reward.func
        if not isinstance(reward, types.FunctionType | types.MethodType):
            reward = getattr(reward, "__call__", None)  # noqa: B004 - the method itself is read
        if isinstance(reward, types.MethodType):
            position += 1
            holder, reward = reward.__self__, reward.__func__
        function = inspect.unwrap(reward) if callable(reward) else None
        if not isinstance(function, types.FunctionType):
            return None
        if function.__code__.co_argcount <= position:
            return None
        return cls(function, function.__code__.co_varnames[position], holder)

    def uses(self) -> tuple[bool, set[str]]:
        """Whether the code leaves open which keys are read; keys that it reads by another name."""
        is_open = False
        names: set[str] = set()
        for code in codes(self.function.__code__):
            if code is not self.function.__code__ and self.example not in code.co_freevars:
                continue
            steps = [s for s in dis.get_instructions(code) if s.opname not in ("PUSH_NULL", "COPY")]
            for position, step in enumerate(steps):
                loaded = _loaded(step)
                if self.example not in loaded:
                    continue
                beside = loaded[-1] if loaded[-1] != self.example else None
                use = self._use(steps[position + 1 :], beside)
                is_open |= use is _Use.OPEN
                if isinstance(use, str):
                    names.add(use)
        return is_open, names

    def _use(self, steps: Sequence[dis.Instruction], beside: str | None) -> _Use | str:
        """What is done with the example, just loaded; a key that is known by another name.

        Args:
            steps: the instructions that follow.
            beside: a variable that was loaded onto it by the same instruction.
        """
        if beside is None and steps and steps[0].opname in ("CONTAINS_OP", "MATCH_MAPPING"):
            return _Use.TEXT
        ends: tuple[str, ...] = ("BINARY_SUBSCR",)
        if beside is None and steps and _attribute(steps[0]) in _READS_A_KEY:
            steps, ends = steps[1:], ("PRECALL", "CALL", "LOAD_CONST", "LOAD_FAST", "LOAD_GLOBAL")
        key: Any = _ABSENT if beside is None else self._known(beside)
        for step in steps:
            if step.opname.startswith(ends) and (key is _Use.TEXT or isinstance(key, str)):
                return key
            if key is _ABSENT and step.opname == "LOAD_CONST" and isinstance(step.argval, str):
                key = _Use.TEXT
            elif key is _ABSENT and step.opname.startswith(_LOADS):
                key = self._known(step.argval)
            elif key is not _ABSENT and key is not _Use.TEXT and _attribute(step):
                key = inspect.getattr_static(key, _attribute(step), _ABSENT)
            else:
                return _Use.OPEN
            if key is _ABSENT:
                return _Use.OPEN
        return _Use.OPEN

    def _known(self, name: Any) -> Any:
        """What a name stands for when the function is called."""
        if name == self.function.__code__.co_varnames[0] and self.holder is not _ABSENT:
            return self.holder
        function = self.function
        for known in (_defaults(function), cell_values(function), function.__globals__):
            if name in known:
                return known[name]
        return _ABSENT


def _defaults(function: types.FunctionType) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _loaded(step: dis.Instruction) -> tuple[Any, ...]:
    """Names of the variables that an instruction puts on the stack, the last one on top."""
    if not step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
        return ()
    if step.opname.startswith("LOAD_FAST_AND_CLEAR"):
        return ()
    return step.argval if isinstance(step.argval, tuple) else (step.argval,)


def _attribute(step: dis.Instruction) -> str:
    return str(step.argval) if step.opname in ("LOAD_ATTR", "LOAD_METHOD") else ""


def _fields(function: types.FunctionType) -> Iterator[str]:
    """Names under which a function may find what an example has: attributes and parameters."""
    for code in codes(function.__code__):
        yield from code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        yield from filter(None, map(_attribute, dis.get_instructions(code)))


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
