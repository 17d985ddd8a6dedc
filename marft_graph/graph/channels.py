"""What a compiled LangGraph app says of its channels."""

from __future__ import annotations

from typing import Any

from langgraph.channels import (
    AnyValue,
    EphemeralValue,
    LastValue,
    LastValueAfterFinish,
    UntrackedValue,
)
from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel

Names = frozenset[str]
_REPLACED = (LastValue, LastValueAfterFinish, EphemeralValue, AnyValue, UntrackedValue)


def collects(channel: Any) -> bool:
    """Whether a channel keeps what it held when something is written to it, as reducers do."""
    return not isinstance(channel, _REPLACED)


def state_channels(app: Pregel[Any, Any, Any, Any]) -> frozenset[str]:
    """Channels that hold state."""
    hidden = ("branch:", "join:", "__pregel", "__start__")
    return frozenset(name for name in app.channels if not name.startswith(hidden))


def read_channels(app: Pregel[Any, Any, Any, Any], node: str) -> frozenset[str]:
    """State channels that a node is given."""
    return _names(app.nodes[node].channels) & state_channels(app) or state_channels(app)


def input_channels(app: Pregel[Any, Any, Any, Any]) -> frozenset[str]:
    """State channels that an input of the app can fill."""
    if isinstance(app, CompiledStateGraph):
        schema = app.builder.schemas[app.builder.input_schema]
        return frozenset(schema) & state_channels(app)
    return _names(app.input_channels) & state_channels(app)


def output_channels(app: Pregel[Any, Any, Any, Any]) -> frozenset[str]:
    """State channels that the app returns."""
    return _names(app.output_channels) & state_channels(app)


def _names(channels: Any) -> frozenset[str]:
    return frozenset([channels] if isinstance(channels, str) else channels)


def branch_channels(app: Pregel[Any, Any, Any, Any], node: str, branch: Any) -> Names:
    """State channels that a node's conditional edge reads: by default those of the node."""
    assert isinstance(app, CompiledStateGraph)  # nothing else has branches
    schema = branch.input_schema
    if schema is None and node not in app.builder.nodes:  # a conditional entry
        schema = app.builder.state_schema
    if schema is None:
        return read_channels(app, node)
    return frozenset(app.builder.schemas.get(schema, ())) & state_channels(app)
