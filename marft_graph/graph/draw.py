"""A Flex-MG in words and in the languages of drawing tools: terminal text, Mermaid, Graphviz."""

from __future__ import annotations

import json

import networkx as nx

from marft_graph.graph.flex_mg import END, START, FlexMG


def summary(flex_mg: FlexMG) -> str:
    """A readable summary for the terminal: agents, what each observes, loops, warnings."""
    agents = flex_mg.agents
    width = max((len(agent) for agent in agents), default=0)
    lines = [f"{len(agents)} agents, {len(flex_mg.environment)} environment nodes"]
    for agent in agents:
        seen = [
            other if flex_mg.dependency(agent, other) == "always" else f"{other} (possibly)"
            for other in agents
            if flex_mg.dependency(agent, other) != "never"
        ]
        lines.append(f"  {agent:<{width}}  observes {', '.join(seen) or 'no other agent'}")
    if flex_mg.environment:
        lines.append(f"environment: {', '.join(flex_mg.environment)}")
    lines += [f"loop: {' -> '.join([*loop, loop[0]])}" for loop in flex_mg.loops]
    lines += [f"parallel: {', '.join(group)}" for group in flex_mg.parallel_groups]
    lines += [f"warning: {text}" for text in warnings(flex_mg)]
    return "\n".join(lines)


def warnings(flex_mg: FlexMG) -> list[str]:
    """What is odd about the graph, a sentence each."""
    control = flex_mg.control
    reachable = nx.descendants(control, START)
    finishing = nx.ancestors(control, END)
    found = [
        f"{node} can never run" for node in flex_mg.graph if node not in {START, END} | reachable
    ]
    found += [
        f"{agent} never influences the output"
        for agent in flex_mg.agents
        if agent in reachable and agent not in finishing
    ]
    found += [f"the code of {node} could not be read" for node in flex_mg.uncertain]
    if not flex_mg.agents:
        found.append("no node calls a chat model, so there is nothing to train")
    return sorted(found)


def to_mermaid(flex_mg: FlexMG) -> str:
    """The graph in Mermaid's flowchart language."""
    ids = {node: f"n{index}" for index, node in enumerate(sorted(flex_mg.graph))}
    lines = ["flowchart TD"]
    for node in sorted(flex_mg.graph):
        label = node.strip("_").replace('"', "#quot;")
        shape = {"agent": f'(["{label}"])', "boundary": f'(("{label}"))'}.get(
            flex_mg.graph.nodes[node]["role"], f'["{label}"]'
        )
        lines.append(f"    {ids[node]}{shape}")
    arrows = {"control": "-->", "conditional": "-.->", "fan_out": "==>"}
    lines += [f"    {ids[a]} {arrows[kind]} {ids[b]}" for a, b, kind in flex_mg.control_edges]
    return "\n".join(lines) + "\n"


def to_dot(flex_mg: FlexMG) -> str:
    """The graph in Graphviz's language; dependencies as orange edges that do not move nodes."""
    lines = ["digraph {", "    node [fontname=sans-serif];"]
    for node in sorted(flex_mg.graph):
        role = flex_mg.graph.nodes[node]["role"]
        shape = {"boundary": "point", "environment": "box"}.get(role, "box, style=rounded")
        lines.append(f"    {_quoted(node)} [shape={shape}];")
    styles = {"control": "solid", "conditional": "dashed", "fan_out": "bold"}
    lines += [
        f"    {_quoted(a)} -> {_quoted(b)} [style={styles[kind]}];"
        for a, b, kind in flex_mg.control_edges
    ]
    lines += [
        f"    {_quoted(j)} -> {_quoted(i)} [color=darkorange, constraint=false];"
        for i, j in flex_mg.observations
    ]
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)
