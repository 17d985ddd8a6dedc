"""Who answers a node in a rollout: its adapter, its own model on purpose, or nobody yet.

The rule: the run decides, the code only guesses. A node that the code did not show is met when it
first asks its model, before anything has left for it, and `new_nodes` says what becomes of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import Any, Literal

from langgraph.pregel import Pregel

from marft_graph.errors import UndecidedCallError
from marft_graph.graph.compile import compile_graph
from marft_graph.names import adapter_name, agent_path
from marft_graph.rollout.callsite import CallSite

logger = logging.getLogger(__name__)

NewNodes = Literal["stop", "freeze", "train"]
"""What becomes of a node that asks a model and that nobody had decided on."""


class Decisions:
    """Which nodes of an app are trained, which are frozen, and what becomes of others.

    Args:
        graph: the app.
        trained: agent paths; empty: every node that calls a model.
        adapters: name of the agent that answers a node, where it is not the node's own.
        frozen: agent paths whose own models answer. Without it, and always beside it, those agents
            that the code shows and that are not trained.
        new_nodes: for nodes that are neither.
        on_new_node: told of each such node whose own model answers, once; None: the log is.
    """

    def __init__(
        self,
        graph: Pregel[Any, Any, Any, Any],
        *,
        trained: Collection[str] = (),
        adapters: Mapping[str, str],
        frozen: Collection[str] = (),
        new_nodes: NewNodes = "stop",
        on_new_node: Callable[[CallSite], None] | None = None,
    ) -> None:
        self._graph = graph
        self._trained = frozenset(trained)
        self._adapters = adapters
        self._named_frozen = frozenset(frozen)
        self._new_nodes = new_nodes
        self._on_new_node = on_new_node or _log
        self._told: set[str] = set()

    def agent_of(self, node: str) -> str | None:
        """Adapter that answers for a node path, if one does."""
        agent = agent_path(node)
        is_trained = not self._trained or agent in self._trained
        if not is_trained and (self._new_nodes != "train" or self.is_frozen(node)):
            return None
        return self._adapters.get(agent, adapter_name(agent))

    def is_frozen(self, node: str) -> bool:
        """Whether a node's own model answers on purpose."""
        agent = agent_path(node)
        return agent in self._named_frozen or agent in self._frozen_by_code

    def pass_on(self, site: CallSite) -> bool:
        """Let a node's own model answer; whether that was decided before.

        Raises:
            UndecidedCallError: nobody decided it.
        """
        if site.node and self.is_frozen(site.node):
            return True
        if self._new_nodes != "freeze":
            raise UndecidedCallError(f"{site}. {_ways_out(site)}", agent_path(site.node))
        if site.node not in self._told:
            self._told.add(site.node)
            self._on_new_node(site)
        return False

    @cached_property
    def _frozen_by_code(self) -> frozenset[str]:
        if not self._trained:
            return frozenset()
        return frozenset(compile_graph(self._graph).agents) - self._trained


def _ways_out(site: CallSite) -> str:
    agent = agent_path(site.node)
    train = f"name {agent!r} in `nodes`, or set new_nodes to 'train'" if agent else "ask in a node"
    if "plain language model" in site.model:
        train = "use its chat model instead (a BaseChatModel, such as ChatOpenAI)"
    return (
        "Nobody decided who answers it, so nobody was asked. To train it, "
        f"{train}; to let its own model answer, set new_nodes to 'freeze'"
    )


def _log(site: CallSite) -> None:
    logger.warning("%s; it answers, as new_nodes is 'freeze'", site)
