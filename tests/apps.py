"""LangGraph apps as users write them, for tests; none imports marft_graph."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Annotated, Any, TypedDict

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send

model = ChatOpenAI(model="gpt-4o-mini", api_key="not-set")  # at import, as apps do


class DuoState(TypedDict):
    """State of `duo`."""

    question: str
    plan: str
    answer: str


def _plan(state: DuoState) -> dict[str, str]:
    return {"plan": model.invoke([SystemMessage("Plan."), HumanMessage(state["question"])]).text}


def _plan_greedily(state: DuoState) -> dict[str, str]:
    return {"plan": _careful().invoke(state["question"]).text}


def _act_greedily(state: DuoState) -> dict[str, str]:
    return {"answer": _careful().invoke(state["plan"] or "nothing").text}


def _careful() -> ChatOpenAI:
    """A model made inside the node, which asks for temperature 0."""
    return ChatOpenAI(model="gpt-4o-mini", api_key="not-set", temperature=0)


async def _act(state: DuoState) -> dict[str, str]:
    reply = await model.ainvoke([HumanMessage(f"{state['question']} {state['plan']}")])
    return {"answer": reply.text}


def _act_now(state: DuoState) -> dict[str, str]:
    return {"answer": model.invoke([HumanMessage(f"{state['question']} {state['plan']}")]).text}


def duo(*, sync: bool = False, greedy: Collection[str] = ()) -> Any:
    """A planner (sync) and an actor (async, unless `sync`) in a chain."""
    builder = StateGraph(DuoState)
    builder.add_node("planner", _plan_greedily if "planner" in greedy else _plan)
    act = _act_greedily if "actor" in greedy else _act_now if sync else _act
    builder.add_node("actor", act)
    builder.add_edge(START, "planner")
    builder.add_edge("planner", "actor")
    builder.add_edge("actor", END)
    return builder.compile()


class VoteState(TypedDict):
    """State of `voters`."""

    question: str
    votes: Annotated[list[str], operator.add]
    answer: str


def voters(count: int = 3) -> Any:
    """`count` voters with one identical prompt, and an aggregator."""

    def vote(state: VoteState) -> dict[str, list[str]]:
        return {"votes": [model.invoke([HumanMessage(state["question"])]).text]}

    def aggregate(state: VoteState) -> dict[str, str]:
        return {"answer": model.invoke([HumanMessage(" | ".join(state["votes"]))]).text}

    builder = StateGraph(VoteState)
    builder.add_node("voter", vote)
    builder.add_node("aggregator", aggregate)
    builder.add_conditional_edges(
        START, lambda state: [Send("voter", state) for _ in range(count)], ["voter"]
    )
    builder.add_edge("voter", "aggregator")
    builder.add_edge("aggregator", END)
    return builder.compile()
