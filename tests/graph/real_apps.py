"""Apps of the size and shape that people really have; none imports marft_graph."""

from __future__ import annotations

import operator
from typing import Annotated, Any, Literal, TypedDict

from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command, Send
from pydantic import BaseModel

from tests.apps import model


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def look_up(word: str) -> str:
    """Look a word up."""
    return f"about {word}"


def tool_agent() -> Any:
    """LangChain's agent with two tools."""
    return create_agent(model, [add, look_up], name="helper")


def supervisor_team() -> Any:
    """langgraph-supervisor: two agents and who sends work to them."""
    from langgraph_supervisor import create_supervisor

    adder = create_agent(model, [add], name="adder")
    reader = create_agent(model, [look_up], name="reader")
    return create_supervisor([adder, reader], model=model, prompt="Delegate.").compile()


def swarm() -> Any:
    """langgraph-swarm: two agents that hand the talk over to each other."""
    from langgraph_swarm import create_handoff_tool, create_swarm

    alice = create_agent(model, [add, create_handoff_tool(agent_name="bob")], name="alice")
    bob = create_agent(model, [create_handoff_tool(agent_name="alice")], name="bob")
    return create_swarm([alice, bob], default_active_agent="alice").compile()


def reflection() -> Any:
    """langgraph-reflection: an agent and a judge that may send it back to work."""
    from langgraph_reflection import create_reflection_graph

    def work(state: MessagesState) -> Any:
        return {"messages": [model.invoke(state["messages"])]}

    def judge(state: MessagesState) -> Any:
        verdict = model.invoke(state["messages"]).text
        return {"messages": [HumanMessage(verdict)] if len(state["messages"]) < 4 else []}

    parts = []
    for name, node in (("writer", work), ("judge", judge)):
        builder = StateGraph(MessagesState)
        builder.add_node(name, node)
        builder.add_edge(START, name)
        parts.append(builder.compile())
    return create_reflection_graph(*parts, state_schema=MessagesState).compile()


class Desk(TypedDict, total=False):
    """State of `trading_team`."""

    ticker: str
    reports: Annotated[list[str], operator.add]
    debate: Annotated[list[str], operator.add]
    risk: Annotated[list[str], operator.add]
    plan: str
    order: str
    decision: str


ANALYSTS = ("Market Analyst", "Social Analyst", "News Analyst", "Fundamentals Analyst")
DEBATERS = ("Risky Debator", "Safe Debator", "Neutral Debator")


def trading_team() -> Any:
    """Twelve agents: parallel analysts, two debates in loops, and who decides after each."""

    def analyst(name: str) -> Any:
        def report(state: Desk) -> Any:
            return {"reports": [model.invoke(f"{name} {state['ticker']}").text]}

        return report

    def researcher(name: str) -> Any:
        def argue(state: Desk) -> Any:
            said = state["reports"] + state.get("debate", [])
            return {"debate": [model.invoke(f"{name} {said}").text]}

        return argue

    def manager(state: Desk) -> Any:
        return {"plan": model.invoke(str(state["debate"])).text}

    def trader(state: Desk) -> Any:
        return {"order": model.invoke(state["plan"]).text}

    def debater(name: str) -> Any:
        def argue(state: Desk) -> Any:
            return {"risk": [model.invoke(f"{name} {state['order']} {state.get('risk')}").text]}

        return argue

    def decide(state: Desk) -> Any:
        return {"decision": model.invoke(str(state["risk"])).text}

    def next_researcher(state: Desk) -> Literal["Bull Researcher", "Research Manager"]:
        return "Bull Researcher" if len(state["debate"]) < 4 else "Research Manager"

    def next_debater(state: Desk) -> Literal["Risky Debator", "Portfolio Manager"]:
        return "Risky Debator" if len(state["risk"]) < 6 else "Portfolio Manager"

    builder = StateGraph(Desk)
    for name in ANALYSTS:
        builder.add_node(name, analyst(name))
        builder.add_edge(START, name)
    for name in ("Bull Researcher", "Bear Researcher"):
        builder.add_node(name, researcher(name))
    builder.add_node("Research Manager", manager)
    builder.add_node("Trader", trader)
    for name in DEBATERS:
        builder.add_node(name, debater(name))
    builder.add_node("Portfolio Manager", decide)
    builder.add_edge(list(ANALYSTS), "Bull Researcher")
    builder.add_edge("Bull Researcher", "Bear Researcher")
    builder.add_conditional_edges("Bear Researcher", next_researcher)
    builder.add_edge("Research Manager", "Trader")
    builder.add_edge("Trader", "Risky Debator")
    builder.add_edge("Risky Debator", "Safe Debator")
    builder.add_edge("Safe Debator", "Neutral Debator")
    builder.add_conditional_edges("Neutral Debator", next_debater)
    builder.add_edge("Portfolio Manager", END)
    return builder.compile()


class Brief(BaseModel):
    """Structured output of `deep_research`."""

    topics: list[str]
    style: Literal["short", "long"]


class Research(TypedDict, total=False):
    """State of `deep_research`."""

    question: str
    topics: list[str]
    notes: Annotated[list[str], operator.add]
    report: str


class Topic(TypedDict, total=False):
    """State of a researcher."""

    topic: str
    found: Annotated[list[str], operator.add]
    notes: Annotated[list[str], operator.add]


def deep_research() -> Any:
    """A brief as structured output, a supervisor, researchers side by side, and a report."""

    def search(state: Topic) -> Any:
        helper = create_agent(model, [look_up])
        messages = helper.invoke({"messages": [("user", state["topic"])]})["messages"]
        return {"found": [messages[-1].text]}

    def compress(state: Topic) -> Any:
        return {"notes": [model.invoke(str(state["found"])).text]}

    researcher = StateGraph(Topic)
    researcher.add_node("search", search)
    researcher.add_node("compress", compress)
    researcher.add_edge(START, "search")
    researcher.add_edge("search", "compress")

    def supervise(state: Research) -> Command[Literal["researcher", "__end__"]]:
        if len(state.get("notes", [])) > 2:
            return Command(goto=END)
        model.invoke(str(state["topics"]))
        return Command(goto=[Send("researcher", {"topic": topic}) for topic in state["topics"]])

    team = StateGraph(Research)
    team.add_node("supervisor", supervise)
    team.add_node("researcher", researcher.compile())
    team.add_edge(START, "supervisor")
    team.add_edge("researcher", "supervisor")

    def brief(state: Research) -> Any:
        made = model.with_structured_output(Brief).invoke(state["question"])
        return {"topics": [*made.topics, "background"]}

    def write(state: Research) -> Any:
        return {"report": model.invoke(str(state["notes"])).text}

    builder = StateGraph(Research)
    builder.add_node("brief", brief)
    builder.add_node("team", team.compile())
    builder.add_node("report", write)
    builder.add_edge(START, "brief")
    builder.add_edge("brief", "team")
    builder.add_edge("team", "report")
    return builder.compile()


def sixty() -> Any:
    """Sixty nodes: six rounds of a router, eight workers side by side, and a join."""
    builder = StateGraph(Research)
    before = START
    for turn in range(6):
        router, join = f"router_{turn}", f"join_{turn}"
        workers = [f"worker_{turn}_{number}" for number in range(8)]
        builder.add_node(router, lambda state: {"topics": []})
        builder.add_node(join, lambda state: {"report": model.invoke(str(state["notes"])).text})
        builder.add_edge(before, router)
        for worker in workers:
            builder.add_node(worker, lambda state: {"notes": [model.invoke("note").text]})
            builder.add_edge(router, worker)
        builder.add_edge(workers, join)
        before = join
    return builder.compile()
