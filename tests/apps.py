"""LangGraph apps as users write them, for tests; none imports marft_graph."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Annotated, Any, Literal, TypedDict

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send
from pydantic import BaseModel, ConfigDict, Field

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
    reply = await model.ainvoke([HumanMessage(f"{state['question']} {state.get('plan')}")])
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


def solo() -> Any:
    """The duo's actor alone."""
    builder = StateGraph(DuoState)
    builder.add_node("actor", _act)
    builder.add_edge(START, "actor")
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


class Place(BaseModel):
    """Part of a `Move`."""

    model_config = ConfigDict(extra="forbid")
    row: int = Field(ge=0, le=99)
    side: Literal["left", "right"]


class Move(BaseModel):
    """What `mover` asks its model for."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["go", "stay"]
    steps: int = Field(ge=-100, le=1000)
    place: Place


class MoverState(TypedDict):
    """State of `mover`."""

    question: str
    move: Move
    answer: str


def mover() -> Any:
    """A node that asks for a `Move` and fails without one, and a node that talks about it."""

    def move(state: MoverState) -> dict[str, Move]:
        made = model.with_structured_output(Move).invoke(state["question"])
        assert isinstance(made, Move)
        return {"move": made}

    def tell(state: MoverState) -> dict[str, str]:
        return {"answer": model.invoke(str(state["move"].steps)).text}

    builder = StateGraph(MoverState)
    builder.add_node("mover", move)
    builder.add_node("teller", tell)
    builder.add_edge(START, "mover")
    builder.add_edge("mover", "teller")
    builder.add_edge("teller", END)
    return builder.compile()
