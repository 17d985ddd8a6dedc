"""A Flex-MG in words and in the languages of drawing tools: terminal text, Mermaid, Graphviz."""

from __future__ import annotations

import json
from collections.abc import Sequence

import networkx as nx

from marft_graph.graph.flex_mg import END, START, Evidence, FlexMG
from marft_graph.names import agent_of_adapter

_SHOWN = 10
_KNOWN = {
    "always": "",
    "code": "possibly ",
    "run": "in some runs ",
    "schema": "by its state schema alone ",
}
_DOT_COLOURS = {"code": "darkorange", "run": "purple", "schema": "burlywood"}
_DOT_SHAPES = {
    "agent": "box, style=rounded",
    "frozen": 'box, style="rounded,dashed"',
    "environment": "box",
    "boundary": "point",
}


def summary(flex_mg: FlexMG) -> str:
    """A readable summary for the terminal: agents, what each observes, loops, warnings."""
    agents = flex_mg.agents
    width = max((len(agent) for agent in agents), default=0)
    others = len(flex_mg.order) - len(agents) - len(flex_mg.frozen)
    lines = [_count(len(agents), "agent") + f", {_count(others, 'other node')}"]
    for agent in agents:
        calls = flex_mg.graph.nodes[agent].get("calls")
        often = "" if calls is None else f"  ({calls:g} calls a run)"
        adapter = flex_mg.graph.nodes[agent].get("adapter")
        often += "" if adapter is None else f"  [adapter {agent_of_adapter(adapter)}]"
        lines.append(f"  {agent:<{width}}  observes {_observed(flex_mg, agent)}{often}")
    if flex_mg.frozen:
        lines.append(f"frozen (call a model, not trained): {', '.join(flex_mg.frozen)}")
    if flex_mg.environment:
        lines.append(f"environment (call no model): {_listed(flex_mg.environment)}")
    doubtful = [node for node in flex_mg.uncertain if node not in (*agents, *flex_mg.frozen)]
    if doubtful:
        lines.append(f"no model found in their code, not all of it known: {_listed(doubtful)}")
    cycles = flex_mg.cycles
    lines += [f"loop: {' -> '.join([*cycle, cycle[0]])}" for cycle in cycles[:_SHOWN]]
    if len(cycles) > _SHOWN:
        lines.append(f"and {_count(len(cycles) - _SHOWN, 'more loop')}")
    lines += [f"parallel: {', '.join(group)}" for group in flex_mg.parallel_groups]
    if flex_mg.fan_outs:
        lines.append(f"side by side with itself (Send): {', '.join(flex_mg.fan_outs)}")
    lines += [f"note: {text}" for text in flex_mg.notes]
    lines += [f"warning: {text}" for text in warnings(flex_mg)]
    return "\n".join(lines)


def _observed(flex_mg: FlexMG, agent: str) -> str:
    """Whom an agent observes: always, possibly by its code, seen in a run, or by its schema."""
    seen: dict[str, list[str]] = {}
    for other in flex_mg.agents:
        dependency = flex_mg.dependency(agent, other)
        if dependency != "never":
            known = "always" if dependency == "always" else flex_mg.evidence(agent, other)
            seen.setdefault(known, []).append("itself" if other == agent else other)
    parts = [f"{text}{_listed(seen[known])}" for known, text in _KNOWN.items() if known in seen]
    return "; ".join(parts) or "no other agent"


def _listed(names: Sequence[str]) -> str:
    shown, rest = names[:_SHOWN], len(names) - _SHOWN
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def warnings(flex_mg: FlexMG) -> list[str]:
    """What is odd about the graph, a sentence each."""
    control = flex_mg.control
    reachable = nx.descendants(control, START)
    influential = nx.ancestors(flex_mg.data, END)
    deciding = {a for a, _, kind in flex_mg.control_edges if kind != "control"}
    found = [
        f"{node} can never run" for node in flex_mg.graph if node not in {START, END} | reachable
    ]
    found += [
        f"{agent} never influences the output"
        for agent in flex_mg.agents
        if agent in reachable and agent not in influential | deciding
    ]
    for node in flex_mg.uncertain:
        if flex_mg.graph.nodes.get(node, {}).get("role", "environment") == "environment":
            found.append(_doubt(flex_mg, node))
    for node in flex_mg.unseen:
        for client in flex_mg.graph.nodes[node]["clients"]:
            found.append(f"{node} {_asks(client)}: its calls are neither seen nor trained")
    if not flex_mg.agents:
        found.append("no node calls a chat model, so there is nothing to train")
    return sorted(found)


def role_of(flex_mg: FlexMG, node: str) -> str:
    """What a node is, in words: `agent`, `calls no model`, ..."""
    role = str(flex_mg.graph.nodes[node]["role"])
    if role in ("agent", "frozen"):
        return "agent" if role == "agent" else "agent, not trained"
    if node in flex_mg.unseen:
        return "asks a provider past LangChain"
    return "no model found in its code" if node in flex_mg.uncertain else "calls no model"


def _doubt(flex_mg: FlexMG, node: str) -> str:
    unknown = flex_mg.graph.nodes.get(node, {}).get("unresolved")
    if not unknown:
        return f"the code of {node} could not be read"
    return (
        f"{node} may call a model: its code does not show what {unknown[0]} is; a dry run shows it"
    )


def _asks(client: str) -> str:
    if client.startswith("address "):
        return f"asks the {client}"
    last = client.rpartition(".")[2]
    article = "an" if client[0] in "aeiou" else "a"
    return f"holds {article} {client} client" if last[:1].isupper() else f"calls {client}"


def to_mermaid(flex_mg: FlexMG) -> str:
    """The graph in Mermaid's flowchart language."""
    ids = {node: f"n{index}" for index, node in enumerate(sorted(flex_mg.graph))}
    lines = ["flowchart TD"]
    for node in sorted(flex_mg.graph):
        label = node.strip("_").replace('"', "#quot;")
        shape = {
            "agent": f'(["{label}"])',
            "frozen": f'(["{label}"])',
            "boundary": f'(("{label}"))',
        }.get(flex_mg.graph.nodes[node]["role"], f'["{label}"]')
        lines.append(f"    {ids[node]}{shape}")
    arrows = {"control": "-->", "conditional": "-.->", "fan_out": "==>"}
    lines += [f"    {ids[a]} {arrows[kind]} {ids[b]}" for a, b, kind in flex_mg.control_edges]
    return "\n".join(lines) + "\n"


def to_dot(flex_mg: FlexMG) -> str:
    """The graph in Graphviz's language.

    Edges along which something is read are orange where the code says so, purple where a run has
    shown it, and pale where the state schema alone admits it.
    """
    lines = ["digraph {", "    node [fontname=sans-serif];"]
    for node in sorted(flex_mg.graph):
        role = flex_mg.graph.nodes[node]["role"]
        shape = _DOT_SHAPES[role]
        lines.append(f"    {_quoted(node)} [shape={shape}];")
    styles = {"control": "solid", "conditional": "dashed", "fan_out": "bold"}
    lines += [
        f"    {_quoted(a)} -> {_quoted(b)} [style={styles[kind]}"
        f"{_dot_colour(flex_mg.read_by(a, b))}];"
        for a, b, kind in flex_mg.control_edges
    ]
    lines += [
        f"    {_quoted(j)} -> {_quoted(i)} "
        f"[color={_DOT_COLOURS[flex_mg.evidence(i, j)]}, constraint=false];"
        for i, j in flex_mg.distant_observations
    ]
    return "\n".join([*lines, "}"]) + "\n"


def _dot_colour(evidence: Evidence | None) -> str:
    return "" if evidence is None else f", color={_DOT_COLOURS[evidence]}"


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)
