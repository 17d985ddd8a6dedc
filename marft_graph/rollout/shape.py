"""What a compiled graph says of itself before anything has run, for whoever follows its runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from langgraph.pregel import Pregel

from marft_graph.graph.channels import branch_channels, collects
from marft_graph.graph.roles import inspect_node

_NOBODY: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class GraphShape:
    """What a compiled graph says of its channels and nodes."""

    reducers: frozenset[str]
    """Channels that collect their writers."""
    channels: Mapping[str, frozenset[str]]
    """Channels that each node is given."""
    targets: Mapping[str, frozenset[str] | None]
    """Nodes that a node may send to, None for any; absent where it cannot send."""
    branches: Mapping[str, frozenset[str]]
    """Channels that the branches of a node read; they also see all that the node has written."""
    subgraphs: Mapping[str, GraphShape]
    """Nodes that are graphs themselves."""

    @classmethod
    def of(cls, graph: Pregel[Any, Any, Any, Any]) -> GraphShape:
        """The shape of a compiled graph."""
        reducers = {name for name, channel in graph.channels.items() if collects(channel)}
        channels, subgraphs, read = {}, {}, {}
        targets: dict[str, frozenset[str] | None] = {}
        for name, node in graph.nodes.items():
            given = [node.channels] if isinstance(node.channels, str) else node.channels
            channels[name] = frozenset(given)
            if isinstance(node.bound, Pregel):
                subgraphs[name] = cls.of(node.bound)
            if "Send" in inspect_node(node.bound).mentions:
                targets[name] = None
        builder = getattr(graph, "builder", None)
        for name, branches in (builder.branches if builder is not None else {}).items():
            read[name] = frozenset().union(
                *(branch_channels(graph, name, branch) for branch in branches.values())
            )
            for branch in branches.values():
                findings = inspect_node(branch.path)
                if "Send" in findings.mentions or findings.is_opaque:
                    known = targets.get(name, _NOBODY)
                    ends = frozenset((branch.ends or {}).values())
                    targets[name] = None if known is None or not ends else known | ends
        return cls(frozenset(reducers), channels, targets, read, subgraphs)
