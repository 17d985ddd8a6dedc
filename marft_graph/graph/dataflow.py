"""What data can get from which node to which: the edges behind the dependency function.

Data is followed through channels, in and out of subgraphs, in the order in which nodes can run
(`supersteps`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from marft_graph.graph.supersteps import END, NOTHING, Names, Node, Scope, Trigger


@dataclass(frozen=True, slots=True)
class Flow:
    """Data from one node to another, or to END, by paths."""

    source: str
    target: str
    channel: str
    is_certain: bool
    """Whether every run of `target` reads what a run of `source` wrote."""
    is_read_by_code: bool = False
    """Whether the code of `target` says that it reads the channel; else its schema does."""


def flows(top: Scope) -> Iterator[Flow]:
    """All data flows between the visible nodes of an app."""
    return _Flows(top).all()


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A visible node with the way down to it: scopes, and the nodes' names in them."""

    node: Node
    scopes: tuple[Scope, ...]
    names: tuple[str, ...]

    @property
    def path(self) -> str:
        """The vertex; for a node that is none, a name that no vertex has."""
        return self.node.path if self.node.is_visible else f"the code of {self.node.path}"


class _Flows:
    def __init__(self, top: Scope) -> None:
        self._top = top
        self._leaves = list(_leaves(top, (), ()))
        self._up = {leaf.path: _outward(leaf) for leaf in self._leaves}
        self._down = {leaf.path: _inward(leaf) for leaf in self._leaves}
        self._found: dict[tuple[str, str], dict[str, bool]] = {}

    def all(self) -> Iterator[Flow]:
        for source in self._leaves:
            for target in self._leaves:
                for channel, is_certain in self._between(source, target):
                    self._add(source, target, channel, is_certain)
            if source.node.calls_again:
                self._add(source, source, "its own earlier call", False)
        for source, target in self._with_errors():
            self._add(source, target, "the error", False)
        self._add_sent()
        for leaf in self._leaves:
            if not leaf.node.is_visible:
                self._contract(leaf.path)
        for leaf in self._leaves:
            for channel in sorted(self._up[leaf.path][0] & self._top.outputs):
                if leaf.node.is_visible:
                    self._found.setdefault((leaf.path, END), {})[channel] = False
        nodes = {leaf.path: leaf.node for leaf in self._leaves}
        for (a, b), channels in sorted(self._found.items()):
            for channel, is_certain in sorted(channels.items()):
                node = nodes.get(b)
                by_code = node is None or node.is_read_by_code or channel in node.must_read
                yield Flow(a, b, channel, is_certain, by_code)

    def _add(self, source: _Leaf, target: _Leaf, channel: str, is_certain: bool) -> bool:
        channels = self._found.setdefault((source.path, target.path), {})
        is_new = channel not in channels
        channels[channel] = channels.get(channel, False) or is_certain
        return is_new

    def _contract(self, hidden: str) -> None:
        """Join what flows into a node that is no vertex to what flows out of it."""
        into = [a for a, b in self._found if b == hidden and a != hidden]
        out = {b: channels for (a, b), channels in self._found.items() if a == hidden}
        for source in into:
            for target, channels in out.items():
                for channel in channels if target != hidden else ():
                    self._found.setdefault((source, target), {}).setdefault(channel, False)
        self._found = {pair: c for pair, c in self._found.items() if hidden not in pair}

    def _between(self, source: _Leaf, target: _Leaf) -> Iterator[tuple[str, bool]]:
        """Channels through which one leaf's writes reach another's reads."""
        for level, (scope, other) in enumerate(zip(source.scopes, target.scopes, strict=False)):
            if scope is not other:
                return
            a, b = source.names[level], target.names[level]
            written, read = self._up[source.path][level], self._down[target.path][level]
            if scope.order.before(a, b):
                for channel in sorted(written & read):
                    yield channel, self._is_certain(source, target, level, channel)
            container = scope.nodes[a]
            if a == b and not container.is_graph and self._hand_over(source, target, level):
                yield f"the code of {container.path}", False

    def _hand_over(self, source: _Leaf, target: _Leaf, level: int) -> bool:
        """Whether a node's code can pass something on between itself and the graphs it runs."""
        leaves = len(source.scopes) - 1 > level, len(target.scopes) - 1 > level
        if not any(leaves):
            return False  # the node itself, twice
        out = self._up[source.path][level + 1] if leaves[0] else {""}
        into = self._down[target.path][level + 1] if leaves[1] else {""}
        return bool(out and into)

    def _is_certain(self, source: _Leaf, target: _Leaf, level: int, channel: str) -> bool:
        scope = source.scopes[level]
        if len(source.scopes) != level + 1 or len(target.scopes) != level + 1:
            return False  # through a subgraph: possible
        a, b = source.names[level], target.names[level]
        if not (source.node.always_calls and channel in source.node.must_write):
            return False
        if not scope.order.must_precede(a, b) or b in scope.sent_to:
            return False
        if channel not in target.node.must_read:
            return False
        if channel in scope.reducers:
            return True
        return not any(
            scope.order.before(name, b) and scope.order.before(a, name)
            for name in self._writers(scope, channel) - {a}
        )

    def _writers(self, scope: Scope, channel: str) -> set[str]:
        """Nodes of a scope that may write a channel, or whose graphs may."""
        return {
            leaf.names[level]
            for leaf in self._leaves
            for level, other in enumerate(leaf.scopes)
            if other is scope and channel in self._up[leaf.path][level]
        }

    def _with_errors(self) -> Iterator[tuple[_Leaf, _Leaf]]:
        """Leaves inside a node that may fail, with those inside its error handler."""
        scopes = {id(scope): scope for leaf in self._leaves for scope in leaf.scopes}.values()
        for scope in scopes:
            for failing, handler in scope.errors:
                for source, _ in self._inside(scope, failing):
                    for target, _ in self._inside(scope, handler):
                        yield source, target

    def _add_sent(self) -> None:
        """A `Send` hands over what its sender knows and what it made, whatever the channel."""
        scopes = {id(scope): scope for leaf in self._leaves for scope in leaf.scopes}.values()
        changed = True
        while changed:  # what was sent may be sent on
            changed = False
            for scope in scopes:
                for trigger in scope.triggers:
                    if trigger.kind == "fan_out" and trigger.target in scope.nodes:
                        for source in self._known_to(scope, trigger):
                            for target in self._entering(scope, trigger.target):
                                changed |= self._add(source, target, "Send", False)

    def _entering(self, scope: Scope, name: str) -> list[_Leaf]:
        """Leaves that read what their node in `scope` was sent."""
        return [leaf for leaf, level in self._inside(scope, name) if self._takes(leaf, level)]

    def _takes(self, leaf: _Leaf, level: int) -> bool:
        return len(leaf.scopes) == level + 1 or bool(self._down[leaf.path][level + 1])

    def _known_to(self, scope: Scope, trigger: Trigger) -> list[_Leaf]:
        """Leaves whose output a node in `scope`, or its branch, hands on when it sends."""
        inside = [leaf for leaf, _ in self._inside(scope, trigger.via or trigger.source)]
        paths = {leaf.path for leaf in inside}
        known = [
            leaf
            for leaf in self._leaves
            if any(leaf.path == a and b in paths for a, b in self._found)
        ]
        read = [leaf for leaf in self._leaves if self._reaches_branch(leaf, scope, trigger)]
        return [*inside, *known, *read]

    def _reaches_branch(self, leaf: _Leaf, scope: Scope, trigger: Trigger) -> bool:
        """Whether a branch in `scope` can read what a leaf writes, there or around it."""
        branch = Node(trigger.source, trigger.reads, NOTHING, NOTHING)
        for inner in self._leaves:
            level = next((i for i, other in enumerate(inner.scopes) if other is scope), None)
            if level is not None:
                break
        else:
            return False
        names = (*inner.names[:level], trigger.source)
        reader = _Leaf(branch, inner.scopes[: level + 1], names)
        wanted = _inward(reader)
        for place, (ours, theirs) in enumerate(zip(leaf.scopes, reader.scopes, strict=False)):
            if ours is not theirs:
                return False
            a, b = leaf.names[place], names[place]
            if self._up[leaf.path][place] & wanted[place] and ours.order.before(a, b):
                return True
        return False

    def _inside(self, scope: Scope, name: str) -> list[tuple[_Leaf, int]]:
        return [
            (leaf, level)
            for leaf in self._leaves
            for level, other in enumerate(leaf.scopes)
            if other is scope and leaf.names[level] == name
        ]


def _leaves(scope: Scope, scopes: tuple[Scope, ...], names: tuple[str, ...]) -> Iterator[_Leaf]:
    for name, node in scope.nodes.items():
        here, called = (*scopes, scope), (*names, name)
        if not node.is_graph:
            yield _Leaf(node, here, called)
        for inner in node.inner:
            yield from _leaves(inner, here, called)


def _outward(leaf: _Leaf) -> list[Names]:
    """For each scope around a leaf, the channels in it that can carry what the leaf writes."""
    carried = leaf.node.may_write
    found = [carried]
    for level in range(len(leaf.scopes) - 2, -1, -1):
        scope, inner = leaf.scopes[level], leaf.scopes[level + 1]
        container = scope.nodes[leaf.names[level]]
        leaving = carried & inner.outputs
        if container.hands_over:
            carried = scope.channels
        elif container.is_graph:
            carried = leaving & scope.channels
        else:
            carried = container.may_write if leaving else NOTHING
        found.append(carried)
    return found[::-1]


def _inward(leaf: _Leaf) -> list[Names]:
    """For each scope around a leaf, the channels in it that can reach what the leaf reads."""
    wanted = leaf.node.reads
    found = [wanted]
    for level in range(len(leaf.scopes) - 2, -1, -1):
        scope, inner = leaf.scopes[level], leaf.scopes[level + 1]
        container = scope.nodes[leaf.names[level]]
        entering = wanted & inner.inputs
        if container.is_graph:
            wanted = entering & container.reads
        else:
            wanted = container.reads if entering else NOTHING
        found.append(wanted)
    return found[::-1]
