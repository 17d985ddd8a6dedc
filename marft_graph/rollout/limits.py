"""How long an episode's graphs may go on: steps of a graph, where the app sets no limit itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from langgraph._internal._config import DEFAULT_RECURSION_LIMIT
from langgraph.pregel import Pregel

RECURSION_LIMIT = 25
"""Steps of a graph where neither the app nor a setting says otherwise."""
_FILLED_IN = frozenset({9_999, 10_000, int(DEFAULT_RECURSION_LIMIT)})
"""Limits that LangGraph and `create_agent` fill in by themselves: the app has set none."""


def limit_of_graph(graph: Pregel[Any, Any, Any, Any], setting: int | None) -> int:
    """Steps that an app may take: the setting, else what its `with_config` says, else 25.

    >>> from langgraph.graph import MessagesState, StateGraph
    >>> builder = StateGraph(MessagesState).add_node("a", lambda state: {})
    >>> app = builder.set_entry_point("a").compile()
    >>> limit_of_graph(app, None), limit_of_graph(app.with_config(recursion_limit=7), None)
    (25, 7)
    >>> limit_of_graph(app.with_config(recursion_limit=7), 12)
    12
    """
    if setting is not None:
        return setting
    return limit_of_steps(graph.config or {}, RECURSION_LIMIT)


def limit_of_steps(config: Mapping[str, Any], default: int) -> int:
    """Steps of one run: what its config says, but for what the libraries fill in."""
    limit = config.get("recursion_limit")
    return default if limit is None or int(limit) in _FILLED_IN else int(limit)


def too_many_steps(limit: int, names: Iterable[str]) -> str:
    """What to say of a graph that did not end.

    Args:
        limit: the limit that it met.
        names: of the tasks that ran, in their order.
    """
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    often = sorted(counts.items(), key=lambda item: -item[1])[:3]
    loops = ", ".join(f"{name} {count} times" for name, count in often if count > 1)
    return (
        f"the graph did not end within {limit} steps (recursion_limit)"
        + (f"; it ran {loops}" if loops else "")
        + ". A loop that should be longer needs a higher recursion_limit; one that the policy is "
        "to learn to leave can earn a reward by fault_rewards: GraphRecursionError=0"
    )
