"""What runs after what inside one graph: its edges, and those that its code takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from langgraph.graph.state import CompiledStateGraph

from marft_graph.graph.channels import branch_channels
from marft_graph.graph.flex_mg import END, START
from marft_graph.graph.parts import App, Part, mentions_inside
from marft_graph.graph.roles import inspect_node
from marft_graph.graph.source import Reading, read_source
from marft_graph.graph.supersteps import Node, Trigger


def triggers_of(app: App, parts: list[Part], nodes: Mapping[str, Node]) -> list[Trigger]:
    """Edges between an app's own nodes, START and END."""
    if not isinstance(app, CompiledStateGraph):  # the functional API, or a Pregel made by hand
        return [
            trigger
            for name in nodes
            for trigger in (Trigger(START, name, "control"), Trigger(name, END, "control"))
        ]
    routers = frozenset(part.key for part in parts if part.name == START)
    ordinary = [part for part in parts if part.name != START]
    everywhere = frozenset({*(part.name for part in ordinary if not part.guards), END})
    triggers = _edges(app.builder, nodes)
    triggers += [Trigger(START, router, "control") for router in sorted(routers)]
    triggers += _branches(app, routers, everywhere)
    leaving = frozenset(trigger.source for trigger in triggers)
    staying = []
    for part in ordinary:
        commands = _commands(part, nodes[part.key], part.key in leaving, everywhere)
        triggers += commands
        if commands and part.key not in leaving and part.reading.may_stay:
            staying.append(part.key)
        triggers += [Trigger(guarded, part.key, "conditional") for guarded in part.guards]
    known = {START, END, *nodes}
    triggers = [_to_end_once(t) for t in triggers if t.source in known and t.target in known]
    handlers = {part.key for part in parts if part.guards}
    going = {trigger.source for trigger in triggers if trigger.target not in handlers}
    triggers += [Trigger(p.key, END, "control") for p in ordinary if p.key not in going]
    triggers += [Trigger(name, END, "conditional", (), "command") for name in sorted(staying)]
    return sorted(set(triggers), key=lambda t: (t.source, t.target, t.kind, t.join, t.choice))


def _edges(builder: Any, nodes: Mapping[str, Node]) -> list[Trigger]:
    """Edges that are declared."""
    triggers = [
        Trigger(a, b, "conditional" if a in nodes and nodes[a].hands_over else "control")
        for a, b in builder.edges
    ]
    for sources, target in builder.waiting_edges:
        join = tuple(sorted(sources))
        triggers += [Trigger(source, target, "control", join) for source in join]
    return triggers


def _branches(
    app: CompiledStateGraph[Any, Any, Any, Any], routers: frozenset[str], everywhere: frozenset[str]
) -> Iterable[Trigger]:
    """Where conditional edges lead."""
    for source, branches in app.builder.branches.items():
        for label, branch in branches.items():
            reading = read_source(branch.path)
            mentions = inspect_node(branch.path).mentions
            kind = "fan_out" if "Send" in mentions else "conditional"
            declared = frozenset((branch.ends or {}).values())
            if declared:  # LangGraph holds names to that, and lets `Send` go where it likes
                declared |= reading.sent
            targets = declared or _targets(frozenset(), reading, everywhere)
            if reading.may_send_nothing:
                targets |= {END}
            choice = f"branch {label}" if reading.goes_one_way else ""
            read = branch_channels(app, source, branch)
            via = label if source == START and label in routers else ""
            for target in targets:
                yield Trigger(source, target, kind, (), choice, read, via)


def _commands(
    part: Part, node: Node, is_leaving: bool, everywhere: frozenset[str]
) -> list[Trigger]:
    """Where what a node returns leads, such as a `Command`.

    Args:
        part: the node.
        node: the same in the data flow.
        is_leaving: whether edges lead away from it.
        everywhere: where a `Command` may go of which nothing is known.
    """
    mentions = mentions_inside(part.code) if node.hands_over else part.code.users_mentions
    kind = "fan_out" if "Send" in mentions else "conditional"
    may_go = "Command" in mentions or node.hands_over
    if part.reading.targets is None and part.code.unresolved and not is_leaving:
        may_go = True  # what it returns may be a Command
    declared = frozenset(part.spec.ends or ())
    targets = _targets(declared, part.reading, everywhere if may_go else None)
    choice = "command" if part.reading.goes_one_way else ""
    return [Trigger(part.key, target, kind, choice=choice) for target in targets]


def _to_end_once(trigger: Trigger) -> Trigger:
    """Whatever else a node sends, to END it sends nothing."""
    if (trigger.target, trigger.kind) == (END, "fan_out"):
        return dataclasses.replace(trigger, kind="conditional")
    return trigger


def _targets(
    declared: frozenset[str], reading: Reading, everywhere: frozenset[str] | None
) -> frozenset[str]:
    """Nodes that a branch or a `Command` may lead to.

    Args:
        declared: what the user declares; it only says what is drawn, so that what the code names
            counts as well.
        reading: what the code says.
        everywhere: where it may go if neither tells; None: nowhere.
    """
    if declared:
        return declared | reading.named
    if reading.targets is not None:
        return reading.targets
    return frozenset() if everywhere is None else everywhere
