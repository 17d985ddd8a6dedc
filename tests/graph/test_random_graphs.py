"""Random graphs, run and compared: parents with brute-force provenance, D with every run.

Each example is the source of an app. Its channels hold tags of the calls that made them, so that a
call can say itself what its prompt was made from; nothing of that is known to the tracer.
"""

from __future__ import annotations

import itertools
import linecache
import operator
import zlib
from collections import Counter
from typing import Annotated, Any, TypedDict

import networkx as nx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, Send

from marft_graph import FakeEngine, compile_graph, run_episodes
from marft_graph.names import agent_path
from tests.apps import model

CHANNELS = ("c0", "c1", "c2", "c3", "log")
_files = itertools.count()


class State(TypedDict, total=False):
    """Texts of tags, separated by spaces."""

    c0: str
    c1: str
    c2: str
    c3: str
    log: Annotated[list[str], operator.add]


class Ledger:
    """What the nodes of one run say of themselves."""

    def __init__(self, turns: list[int]) -> None:
        self.expected: dict[str, set[str]] = {}
        self._turns = turns
        self._taken: Counter[str] = Counter()
        self._numbers = itertools.count()

    def tags(self, state: dict[str, Any]) -> set[str]:
        """Tags of all that a node was given."""
        texts = [t for v in state.values() for t in (v if isinstance(v, list) else [v])]
        return set(" ".join(texts).split())

    def some(self, *values: Any) -> set[str]:
        """Tags of some values that a node looked at."""
        return self.tags({str(place): value or "" for place, value in enumerate(values)})

    def ask(self, name: str, seen: set[str]) -> str:
        """A prompt that names the call; what it was made from is noted."""
        tag = f"{name}#{next(self._numbers)}"
        self.expected[tag] = set(seen)
        return tag

    def turn(self, place: str, targets: list[Any]) -> Any:
        """One of the targets; the last one when this place of the app was reached often."""
        self._taken[place] += 1
        if self._taken[place] > 2 or not self._turns:
            return targets[-1]
        number = zlib.crc32(f"{place} {self._taken[place]}".encode())
        return targets[self._turns[number % len(self._turns)] % len(targets)]

    def text(self, tags: set[str]) -> str:
        return " ".join(sorted(tags))


def load(source: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run source that can be read back, as that of a file can."""
    name = f"<random graph {next(_files)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), names)  # the test's own source
    return names


@st.composite
def reading_sources(draw: st.DrawFn) -> list[str]:
    """How a node looks at its state: at all of it, or at some channels, in ways that are plain."""
    if draw(st.booleans()):
        return ["    seen = ledger.tags(state)"]
    read = draw(st.lists(st.sampled_from(CHANNELS), max_size=3, unique=True))
    ways = [draw(st.sampled_from(["state.get({!r})", "state.get({!r}, '')"])) for _ in read]
    values = ", ".join(way.format(channel) for way, channel in zip(ways, read, strict=True))
    lines = [f"    seen = ledger.some({values})"]
    if draw(st.sampled_from([True, False, False])):  # read on one way only
        other = draw(st.sampled_from(CHANNELS))
        lines += [
            f"    if ledger.turn({draw(st.sampled_from('xyz'))!r}, [0, 1]):",
            f"        seen |= ledger.some(state.get({other!r}))",
        ]
    if draw(st.sampled_from([True, False, False])):  # in a function that gets the whole state
        other = draw(st.sampled_from(CHANNELS))
        lines = [
            "    def looks(given):",
            f"        return ledger.some(given.get({other!r}))",
            *lines,
            "    seen |= looks(state)",
        ]
    return lines


@st.composite
def node_sources(draw: st.DrawFn, name: str) -> str:
    """A node: it may answer without a call, call once or twice, and writes some channels."""
    lines = [f"def {name}(state):", *draw(reading_sources())]
    if draw(st.booleans()) and draw(st.booleans()):
        channel = draw(st.sampled_from(CHANNELS[:4]))
        lines += [
            f"    if ledger.turn({name!r}, [0, 1, 0]):",
            f"        return {{{channel!r}: ledger.text(seen)}}",
        ]
    written = draw(st.lists(st.sampled_from(CHANNELS), min_size=1, max_size=2, unique=True))
    calls = draw(st.sampled_from([1, 1, 1, 2, 0]))
    if calls == 0:
        lines.append("    text = ledger.text(seen)")
    else:
        lines.append(f"    text = model.invoke(ledger.ask({name!r}, seen)).text")
    if calls == 2:
        lines.append(f"    text = model.invoke(ledger.ask({name!r}, seen | {{text}})).text")
    items = ", ".join(f"{c!r}: [text]" if c == "log" else f"{c!r}: text" for c in written)
    if draw(st.sampled_from([True, False, False])):  # writes that cannot be read from the source
        lines += [f"    update = {{{items}}}", "    return update"]
    else:
        lines.append(f"    return {{{items}}}")
    return "\n".join(lines) + "\n"


@st.composite
def graph_sources(draw: st.DrawFn, prefix: str = "n", inner: str = "") -> str:
    """Source that makes `{prefix}_app`, an app of up to six nodes."""
    count = draw(st.integers(2, 6))
    names = [f"{prefix}{i}" for i in range(count)]
    nested = draw(st.sampled_from(names)) if inner else ""
    source = "".join(draw(node_sources(name)) for name in names if name != nested)
    source += f"builder = StateGraph(State)\nbuilder.add_edge(START, {names[0]!r})\n"
    for i, name in enumerate(names):
        if name == nested:
            source += f"builder.add_node({name!r}, {inner})\n"
            continue
        given = ""
        if draw(st.sampled_from([True, False, False])):
            read = draw(st.lists(st.sampled_from(CHANNELS), min_size=1, max_size=3, unique=True))
            source += f"Reads_{name} = TypedDict('Reads_{name}', {{c: str for c in {read!r}}})\n"
            given += f", input_schema=Reads_{name}"
        if i == count - 1 and draw(st.sampled_from([True, False, False])):
            given += ", defer=True"
        source += f"builder.add_node({name!r}, {name}{given})\n"
    sends = 1  # a run does not tell which of several tasks sent: then all count, see `trace`
    for i, name in enumerate(names):
        later = names[i + 1 :]
        for other in later:
            if other == names[i + 1] or draw(st.sampled_from([True, False, False, False])):
                kind = draw(st.sampled_from(["edge", "edge", "choice", "plain", "send", "none"]))
                if kind == "send":
                    kind, sends = ("send", 0) if sends else ("edge", 0)
                source += draw(link_sources(name, other, names, kind, i))
        if i == 0 and len(later) > 2 and draw(st.booleans()):
            source += f"builder.add_edge([{later[0]!r}, {later[1]!r}], {later[2]!r})\n"
    return source + f"{prefix}_app = builder.compile()\n"


@st.composite
def link_sources(
    draw: st.DrawFn, name: str, other: str, names: list[str], kind: str, place: int
) -> str:
    """A way from one node to a later one; a choice may also lead back."""
    if kind == "none":
        return ""
    if kind == "edge":
        return f"builder.add_edge({name!r}, {other!r})\n"
    back = draw(st.sampled_from(names[: place + 1]))
    label = f"{kind}_{name}_{other}"
    if kind == "send":
        return (
            f"def {label}(state):\n"
            f"    text = ledger.text(ledger.tags(state))\n"
            f"    times = ledger.turn({label!r}, [2, 0, 1])\n"
            f"    return [Send({other!r}, {{'c0': text}}) for _ in range(times)]\n"
            f"builder.add_conditional_edges({name!r}, {label}, [{other!r}])\n"
        )
    if kind == "plain":  # can be read from the source
        return (
            f"def {label}(state):\n"
            f"    if ledger.turn({label!r}, [0, 1, 1]):\n        return END\n"
            f"    return {other!r}\n"
            f"builder.add_conditional_edges({name!r}, {label})\n"
        )
    targets = f"[{back!r}, {other!r}, END]"
    declared = f", {targets}" if draw(st.booleans()) else ""
    return (
        f"def {label}(state):\n    return ledger.turn({label!r}, {targets})\n"
        f"builder.add_conditional_edges({name!r}, {label}{declared})\n"
    )


@st.composite
def apps(draw: st.DrawFn) -> tuple[str, list[int]]:
    """Source of an app, some with a graph inside, and the turns that its choices take."""
    turns = draw(st.lists(st.integers(0, 5), max_size=12))
    if draw(st.sampled_from([True, False, False])):
        return draw(graph_sources("i")) + draw(graph_sources("n", "i_app")), turns
    return draw(graph_sources()), turns


def check(source: str, turns: list[int]) -> bool:
    """Compile and run one app; whether the run came to an end."""
    ledger = Ledger(turns)
    names = {
        "model": model,
        "ledger": ledger,
        "State": State,
        "StateGraph": StateGraph,
        "START": START,
        "END": END,
        "Send": Send,
        "Command": Command,
        "TypedDict": TypedDict,
    }
    app = load(source, names)["n_app"]
    flex_mg = compile_graph(app)
    engine = FakeEngine(lambda agent, messages: messages[-1].content)
    (episode,) = run_episodes(app, [{"c0": ""}], engine=engine)
    engine.close()
    if not episode.ok:  # two writers of one channel, or a loop without an end
        assert "InvalidUpdateError" in episode.status or "GraphRecursion" in episode.status
        return False
    tags = [call.messages[0]["content"] for call in episode.calls]
    assert set(tags) == set(ledger.expected)
    calls: nx.DiGraph[str] = nx.DiGraph()
    calls.add_nodes_from(tags)
    for call in episode.calls:
        found = {tags[parent] for parent in call.parents}
        assert found == ledger.expected[tags[call.index]], ("parents", tags[call.index], source)
        calls.add_edges_from((parent, tags[call.index]) for parent in found)
        for parent in call.parents:
            other = episode.calls[parent]
            i, j = agent_path(call.node), agent_path(other.node)
            assert flex_mg.dependency(i, j) != "never", ("never", i, j, source)
    assert nx.is_directed_acyclic_graph(calls)
    called = {agent_path(call.node) for call in episode.calls}
    assert called <= set(flex_mg.agents)
    for call in episode.calls:  # `always` is no promise that is broken
        seen = {agent_path(episode.calls[p].node) for p in call.parents}
        first = not any(episode.calls[p].task_id == call.task_id for p in call.parents)
        for j in flex_mg.agents:
            if first and flex_mg.dependency(agent_path(call.node), j) == "always":
                assert j in seen, ("always", call.node, j, source)
    return True


QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
THOROUGH = settings(
    max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@QUICK
@given(apps())
def test_random_graphs(app: tuple[str, list[int]]) -> None:
    check(*app)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_hundred_random_graphs() -> None:
    ended = []

    @THOROUGH
    @given(apps())
    def run(app: tuple[str, list[int]]) -> None:
        ended.append(check(*app))

    run()
    assert len(ended) >= 500
    assert sum(ended) >= 200
