"""The ways that data takes from node to node along the data edges of a Flex-MG."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import networkx as nx


def ways_from(graph: nx.MultiDiGraph[str], source: str) -> dict[str, list[str]]:
    """Nodes that can observe a node, with a shortest way of its data there.

    Data passes through nodes that make no call of their own, or may make none, and through others
    where these pass it on beside their model's answer.
    """
    ways: dict[str, list[str]] = {}
    seen: set[tuple[str, str]] = set()
    waiting: deque[tuple[list[str], str | None]] = deque([([source], None)])
    while waiting:
        path, arrived = waiting.popleft()
        for _, following, edge in sorted(
            graph.out_edges(path[-1], data=True), key=lambda e: (e[1], str(e[2]))
        ):
            if edge["kind"] != "data":
                continue
            channel = edge["channel"]
            if arrived is not None and not _passes_on(graph.nodes[path[-1]], arrived, channel):
                continue
            way = [*path, following]
            ways.setdefault(following, way)
            if (following, channel) not in seen and following != source:
                seen.add((following, channel))
                waiting.append((way, channel))
    return ways


def _passes_on(node: Mapping[str, Any], arrived: str, channel: str) -> bool:
    """Whether what a node reads in one channel may be in what it writes to another."""
    if node["role"] != "agent" or not node.get("always_calls", False):
        return True
    carries = node.get("carries", {})
    carried = [*carries.get(channel, ()), *carries.get("*", ())]
    is_channel = arrived.isidentifier() and arrived != "Send"
    return bool(carried) and ("*" in carried or not is_channel or arrived in carried)
