"""Nodes of a bound app that have no adapter: their own models answer, and the user is told once."""

from __future__ import annotations

import logging
import threading

from marft_graph.deploy.manifest import Manifest
from marft_graph.names import agent_path
from marft_graph.rollout.callsite import CallSite

logger = logging.getLogger(__name__)


class Untrained:
    """Warns once of each node that asks its own model and was not frozen on purpose in training."""

    def __init__(self, manifest: Manifest) -> None:
        self._frozen = frozenset(manifest.frozen)
        self._told: set[str] = set()
        self._lock = threading.Lock()

    def passed(self, site: CallSite) -> None:
        """A node's own model is about to answer."""
        agent = agent_path(site.node)
        with self._lock:
            is_known = agent in self._frozen or agent in self._told
            self._told.add(agent)
        if not is_known:
            logger.warning(
                "%s, as the export has no adapter for it. To train it, name it in `nodes` or leave "
                "`nodes` empty, and train again; to freeze it on purpose, train with `nodes` that "
                "leave it out, or with new_nodes 'freeze'",
                site,
            )
