"""Where nodes and branches lead: whatever a run goes to is an edge, and what is plain is exact.

Each function here is a node `a`, or a branch behind it, of a graph with the nodes b, c and d.
"""

from __future__ import annotations

import enum
import functools
import operator
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypedDict

import pytest
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, Send
from langgraph.types import Command as Go

from marft_graph import FlexMG, compile_graph
from marft_graph.graph.draw import summary


class State(TypedDict, total=False):
    q: str
    seen: Annotated[list[str], operator.add]


EVERYWHERE = {"a", "b", "c", "d", END}
ROUTES = {"x": "b", "y": "c"}
NEXT = "d"
routes = types.ModuleType("routes")
routes.LAST = "d"  # type: ignore[attr-defined]


class Step(enum.StrEnum):
    B = "b"
    C = "c"


def appended(state: State) -> Any:
    targets = ["b"]
    if len(state["q"]) > 3:
        targets.append("c")
    return targets


def extended(state: State) -> Any:
    targets: list[str] = []
    targets.extend(["b", "c"])
    return targets


def added(state: State) -> Any:
    targets = ["b"]
    targets += ["c"]
    return targets


def inserted(state: State) -> Any:
    targets = ["b"]
    targets.insert(0, "c")
    return targets


def changed_by_a_helper(state: State) -> Any:
    targets = ["b"]
    _fill(targets)
    return targets


def _fill(targets: list[str]) -> None:
    targets.append("c")


def changed_by_its_other_name(state: State) -> Any:
    targets = ["b"]
    same = targets
    same.append("c")
    return targets


def changed_by_index(state: State) -> Any:
    targets = ["b"]
    targets[0] = "c"
    return targets


def changed_inside(state: State) -> Any:
    target = "b"

    def change() -> None:
        nonlocal target
        target = "c"

    change()
    return target


def of_a_comprehension(state: State) -> Any:
    return [name.lower() for name in ("B", "C")]


def sends_of_a_comprehension(state: State) -> Any:
    return [Send("b", {"q": word}) for word in state["q"].split()]


def sends_appended(state: State) -> Any:
    sends = []
    for word in state["q"].split():
        sends.append(Send("b", {"q": word}))
    return sends


def sends_to_chosen(state: State) -> Any:
    return [Send(ROUTES[key], {"q": key}) for key in ROUTES]


def of_a_dict(state: State) -> Any:
    return ROUTES["y"]


def of_an_inline_dict(state: State) -> Any:
    return {"long": "b"}.get(state["q"], "c")


def of_a_loop(state: State) -> Any:
    for name in ("c", "b"):
        if name < "c":
            return name
    return "d"


def of_a_format(state: State) -> Any:
    return f"{'c'}"


def of_a_sum(state: State) -> Any:
    return "" + "c"


def of_a_match(state: State) -> Any:
    match state["q"].split():
        case [first, *_]:
            return "c" if first else "b"
        case _:
            return "d"


def bound_by_a_match(state: State) -> Any:
    target = "b"
    match "c":
        case target:
            pass
    return target


def returned_early(state: State) -> Any:
    if not state["q"]:
        return END
    return "c"


def of_a_constant(state: State) -> Any:
    return NEXT


def of_a_module(state: State) -> Any:
    return routes.LAST


def of_an_enum(state: State) -> Any:
    return Step.C


def of_an_or(state: State) -> Any:
    return "c"


def of_a_parameter(state: State, target: str = "c") -> Any:
    if not state["q"]:
        target = "b"
    return target


def declared_as_one_text(state: State) -> str:
    return ["b", "c"]  # type: ignore[return-value]


def of_another_function(state: State) -> Any:
    return _pick(state)


def _pick(state: State) -> str:
    return "c"


def shadowed(state: State) -> Any:
    return [NEXT.lower() for NEXT in ("B", "C")]


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


@wrapped
def decorated(state: State) -> Any:
    return "c"


class Router:
    func = None  # not what LangChain means by it

    def __call__(self, state: State) -> Any:
        return "c"

    def method(self, state: State) -> Any:
        return "c"


BRANCHES: dict[str, tuple[Any, set[str]]] = {
    function.__name__: (function, expected)
    for function, expected in (
        (appended, {"b", "c"}),
        (extended, {"b", "c", END}),
        (added, {"b", "c"}),
        (inserted, {"b", "c"}),
        (changed_by_a_helper, EVERYWHERE),
        (changed_by_its_other_name, EVERYWHERE),
        (changed_by_index, EVERYWHERE),
        (changed_inside, EVERYWHERE),
        (of_a_comprehension, EVERYWHERE),
        (sends_of_a_comprehension, {"b", END}),
        (sends_appended, {"b", END}),
        (sends_to_chosen, {"b", "c", END}),
        (of_a_dict, {"b", "c"}),
        (of_an_inline_dict, {"b", "c"}),
        (of_a_loop, EVERYWHERE),
        (of_a_format, EVERYWHERE),
        (of_a_sum, EVERYWHERE),
        (of_a_match, {"b", "c", "d"}),
        (bound_by_a_match, EVERYWHERE),
        (returned_early, {"c", END}),
        (of_a_constant, {"d"}),
        (of_a_module, {"d"}),
        (of_an_enum, {"c"}),
        (of_an_or, {"c"}),
        (of_a_parameter, EVERYWHERE),
        (declared_as_one_text, {"b", "c"}),
        (of_another_function, EVERYWHERE),
        (shadowed, EVERYWHERE),
        (decorated, EVERYWHERE),
    )
} | {
    "callable object": (Router(), {"c"}),
    "method": (Router().method, {"c"}),
    "partial": (functools.partial(of_a_parameter, target="c"), EVERYWHERE),
    "lambda": (lambda state: "c" if state["q"] else "b", {"b", "c"}),
}


def go_by_name(state: State) -> Any:
    return Command(goto="c")


def go_to_a_list(state: State) -> Any:
    return Command(goto=["b", "c"])


def go_to_sends(state: State) -> Any:
    sends = []
    for word in state["q"].split():
        sends.append(Send("c", {"q": word}))
    return Command(goto=sends)


def go_somewhere(state: State) -> Any:
    return Command(goto=state["q"][:0] + "c")


def go_by_another_name(state: State) -> Any:
    return Go(goto="c")


def go_by_a_helper(state: State) -> Any:
    return _go("c")


def _go(target: str) -> Any:
    return Command(goto=target)


def go_by_a_helper_of_a_module(state: State) -> Any:
    return routes.go("c")


routes.go = _go  # type: ignore[attr-defined]


def go_where_it_is_not_declared(state: State) -> Command[Literal["b"]]:
    return Command(goto="c")  # type: ignore[arg-type]


def go_or_stay(state: State) -> Any:
    if state["q"] == "stay":
        return {"seen": []}
    return Command(goto="c")


def go_to_the_end(state: State) -> Any:
    return Command(goto=END) if not state["q"] else Command(goto="c", update={"seen": []})


class Going(Command):  # type: ignore[type-arg]
    """A kind of Command of the app's own."""


def go_by_a_subclass(state: State) -> Any:
    return Going(goto="c")


NODES: dict[str, tuple[Any, set[str]]] = {
    function.__name__: (function, expected)
    for function, expected in (
        (go_by_name, {"c"}),
        (go_to_a_list, {"b", "c"}),
        (go_to_sends, {"c", END}),
        (go_somewhere, EVERYWHERE),
        (go_by_another_name, EVERYWHERE),
        (go_by_a_helper, EVERYWHERE),
        (go_by_a_helper_of_a_module, EVERYWHERE),
        (go_where_it_is_not_declared, {"b", "c"}),
        (go_or_stay, {"c", END}),
        (go_to_the_end, {"c", END}),
        (go_by_a_subclass, EVERYWHERE),
    )
} | {"decorated": (wrapped(go_by_name), EVERYWHERE)}


def note(name: str) -> Any:
    return lambda state: {"seen": [name]}


def app_of(node: Any = None, branch: Any = None) -> Any:
    builder = StateGraph(State)
    builder.add_node("a", note("a") if node is None else node)
    for name in "bcd":
        builder.add_node(name, note(name))
    builder.add_edge(START, "a")
    if branch is not None:
        builder.add_conditional_edges("a", branch)
    return builder.compile()


def leaving(flex_mg: FlexMG, node: str) -> set[str]:
    return {b for a, b, _ in flex_mg.control_edges if a == node}


def check(app: Any, expected: set[str]) -> None:
    flex_mg = compile_graph(app)
    assert leaving(flex_mg, "a") == expected
    ran = app.invoke({"q": "long words"})["seen"]
    assert set(ran) - {"a"} <= leaving(flex_mg, "a")
    assert not any(f"{name} can never run" in summary(flex_mg) for name in ran)


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_leads_where_it_can(name: str) -> None:
    branch, expected = BRANCHES[name]
    check(app_of(branch=branch), expected)


@pytest.mark.parametrize("name", NODES)
def test_a_node_goes_where_it_can(name: str) -> None:
    node, expected = NODES[name]
    check(app_of(node), expected)


def test_destinations_are_for_drawing_and_what_the_code_names_counts_as_well() -> None:
    builder = StateGraph(State)
    builder.add_node("a", go_by_name, destinations=("b",))
    builder.add_node("b", note("b"))
    builder.add_node("c", note("c"))
    builder.add_edge(START, "a")
    app = builder.compile()
    assert leaving(compile_graph(app), "a") == {"b", "c"}
    assert app.invoke({"q": "x"})["seen"] == ["c"]


def test_a_send_goes_past_the_declared_ends_of_its_branch() -> None:
    builder = StateGraph(State)
    for name in "abc":
        builder.add_node(name, note(name))
    builder.add_edge(START, "a")
    builder.add_conditional_edges("a", sends_to_c_and_names_b, ["b"])
    app = builder.compile()
    assert leaving(compile_graph(app), "a") == {"b", "c"}
    assert set(app.invoke({"q": "x"})["seen"]) == {"a", "b", "c"}


def sends_to_c_and_names_b(state: State) -> Any:
    return ["b", Send("c", {"q": ""})]


def test_a_command_of_a_tool_leads_on_from_the_node_that_runs_tools() -> None:
    @tool
    def hand_over(word: str) -> Any:
        """Go on."""
        return Command(goto="b", update={"messages": [("user", word)]})

    def call(state: MessagesState) -> Any:
        args = {"name": "hand_over", "args": {"word": "x"}, "id": "1"}
        return {"messages": [AIMessage("", tool_calls=[args])]}

    def last(state: MessagesState) -> Any:
        return {"messages": [("ai", "end")]}

    builder = StateGraph(MessagesState)
    builder.add_node("a", call)
    builder.add_node("tools", ToolNode([hand_over]))
    builder.add_node("b", last)
    builder.add_edge(START, "a")
    builder.add_edge("a", "tools")
    flex_mg = compile_graph(builder.compile())
    assert "b" in leaving(flex_mg, "tools")
    assert "can never run" not in summary(flex_mg)
