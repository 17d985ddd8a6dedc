"""A dry run: what an app does with scripted answers, added to what its code tells.

No model is loaded. A call that offers tools uses each of them once and then answers with text; one
that asks for structured output gets the smallest value that its schema allows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import networkx as nx
from langchain_core.messages import AIMessage

from marft_graph.engine.base import GenerationRequest
from marft_graph.engine.fake import FakeEngine
from marft_graph.episode import Episode, observations
from marft_graph.errors import EpisodeTimeoutError, ReviewerError, UndecidedCallError
from marft_graph.graph.flex_mg import FlexMG
from marft_graph.names import agent_path
from marft_graph.rollout.episodes import Rollout
from marft_graph.rollout.inputs import AppInputs
from marft_graph.rollout.settings import RolloutSettings
from marft_graph.rollout.structure import schema_of
from marft_graph.secret import without_secrets

TEXT = "dry run"
_MOST_EXAMPLES = 8
_SECONDS = 10.0
_MOST_CHARACTERS = 500


def add_dry_run(
    flex_mg: FlexMG,
    graph: Any,
    examples: Iterable[Mapping[str, Any]],
    given: AppInputs,
) -> FlexMG:
    """The Flex-MG with what some runs showed: more agents, and how often each calls its model.

    Every model is answered from a script, or the run ends before anything has left for it; a run
    that takes longer than ten seconds is given up. Notes say which runs failed, and why.

    Args:
        flex_mg: of the same app, as compiled.
        graph: the app; its nodes run, with their side effects, but no model does.
        examples: what to run it on; the first 8 are used.
        given: how the app is called.

    Raises:
        DatasetError: no examples, or an example without the graph's input keys.
    """
    engine = FakeEngine(Script())
    episodes: list[Episode] = []
    undecided = ""
    try:
        rollout = Rollout(
            graph=graph,
            engine=engine,
            reward=None,
            nodes=(),
            adapters={},
            given=given,
            settings=RolloutSettings(episode_timeout=_SECONDS),
        )
        episodes = rollout.run(islice(examples, _MOST_EXAMPLES))
    except (
        UndecidedCallError,
        ReviewerError,
        EpisodeTimeoutError,
    ) as error:  # no call leaves: what cannot be scripted
        undecided = str(error)  # ends the run
    finally:
        engine.close()
    if undecided:
        return replace(flex_mg, notes=(f"dry run: it was stopped: {undecided}",))
    found = flex_mg.graph.copy()
    for node in {agent_path(call.node) for episode in episodes for call in episode.calls}:
        _add_agent(found, node)
    whole = [episode for episode in episodes if episode.ok]
    for node, data in found.nodes(data=True):
        if data["role"] == "agent" and whole:
            calls = sum(agent_path(call.node) == node for e in whole for call in e.calls)
            data["calls"] = round(calls / len(whole), 2)
    for node in greedy_nodes(episodes):
        found.nodes[node]["greedy"] = True
    result = replace(flex_mg, graph=found, notes=()).observed(observations(whole))
    return replace(result, notes=(*_notes(result, episodes),))


def greedy_nodes(episodes: Iterable[Episode]) -> set[str]:
    """Agents that the app asks at temperature 0 only."""
    most: dict[str, float] = {}
    for call in (call for episode in episodes for call in episode.calls):
        node = agent_path(call.node)
        most[node] = max(most.get(node, 0.0), call.temperature)
    return {node for node, temperature in most.items() if temperature == 0}


def with_agent(flex_mg: FlexMG, node: str) -> FlexMG:
    """The Flex-MG with one more agent, which a run showed."""
    graph = flex_mg.graph.copy()
    _add_agent(graph, node)
    return replace(flex_mg, graph=graph)


class Script:
    """Scripted answers that keep an app going: structure where it is asked for, tools in turn.

    An agent uses each of its tools once in a conversation, whatever others have used in it before.
    """

    def __init__(self) -> None:
        self._used: set[tuple[Any, ...]] = set()

    def __call__(self, request: GenerationRequest) -> str | AIMessage:
        """The answer to one call."""
        schema = schema_of(request.response_format)
        if schema is not None:
            return json.dumps(example_of(schema))
        who = (request.agent, *request.order[:2])
        tools = [tool["function"] for tool in request.tools]
        earlier = [m for m in request.messages if isinstance(m, AIMessage)]
        called = {call["name"] for message in earlier for call in message.tool_calls}
        used = {name for name in called if (*who, name) in self._used}
        unused = [tool for tool in tools if tool["name"] not in used]
        if request.tool_choice not in (None, "auto", "none"):
            tools = [tool for tool in tools if tool["name"] in str(request.tool_choice)] or tools
            tools = [tool for tool in tools if tool in unused] or tools[-1:]
        else:
            tools = unused
        if not tools:
            return TEXT
        name, args = tools[0]["name"], example_of(tools[0].get("parameters", {}))
        self._used.add((*who, name))
        number = len(request.messages)
        return AIMessage("", tool_calls=[{"name": name, "args": args, "id": f"call_{number}"}])


def example_of(schema: Mapping[str, Any], root: Mapping[str, Any] | None = None) -> Any:
    """A small value that a JSON schema allows.

    >>> example_of({"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}})
    {'n': 1}
    """
    root = schema if root is None else root
    if "$ref" in schema:
        target: Any = root
        for part in schema["$ref"].lstrip("#/").split("/"):
            target = target[part]
        return example_of(target, root)
    for name in ("const", "default"):
        if name in schema:
            return schema[name]
    if schema.get("enum"):
        return schema["enum"][0]
    for name in ("anyOf", "oneOf", "allOf"):
        if schema.get(name):
            return example_of(schema[name][0], root)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        properties = schema.get("properties", {})
        return {name: example_of(properties[name], root) for name in properties}
    if kind == "array":
        return [example_of(schema["items"], root)] if "items" in schema else []
    number = schema.get("minimum", 1)
    values = {"integer": int(number), "number": float(number), "boolean": True, "null": None}
    return values.get(kind, TEXT[: schema.get("maxLength", len(TEXT))])


def _add_agent(graph: nx.MultiDiGraph[str], node: str) -> None:
    """Make a node an agent; one that the code did not show stands where the node around it does."""
    if node in graph:
        graph.nodes[node]["role"] = "agent"
        return
    graph.add_node(node, role="agent")
    around = node.rpartition("/")[0]
    while around and around not in graph:
        around = around.rpartition("/")[0]
    if not around:
        return
    into, out = list(graph.in_edges(around, data=True)), list(graph.out_edges(around, data=True))
    for source, _, data in into:
        graph.add_edge(node if source == around else source, node, **data)
    for _, target, data in out:
        if target != around:
            graph.add_edge(node, target, **data)
    for a, b in ((around, node), (node, around), (node, node)):
        graph.add_edge(a, b, kind="data", channel=f"the code of {around}", certain=False)
    graph.add_edge(around, node, kind="conditional")
    graph.add_edge(node, around, kind="conditional")


def _notes(flex_mg: FlexMG, episodes: Sequence[Episode]) -> list[str]:
    failed = Counter(e.status for e in episodes if not e.ok)
    first = {e.status: e for e in reversed(episodes) if not e.ok}
    notes = [
        f"dry run: {count} of {len(episodes)} runs failed: {_why(first[status])}"
        for status, count in failed.most_common()
    ]
    if len(failed) and sum(failed.values()) == len(episodes):
        return notes
    silent = [a for a in flex_mg.agents if not flex_mg.graph.nodes[a].get("calls")]
    return notes + [f"dry run: {agent} made no call" for agent in silent]


def _why(episode: Episode) -> str:
    """Why a run failed, on one line: the error's own words, not its kind alone."""
    words = without_secrets(" ".join(episode.error.split())) or episode.status.removeprefix(
        "failed: "
    )
    return words if len(words) <= _MOST_CHARACTERS else f"{words[:_MOST_CHARACTERS]}..."
