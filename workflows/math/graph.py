"""Two solvers and an editor: they solve a competition problem side by side, the editor decides.

An ordinary LangGraph app around an API model. Run it as it is with OPENAI_API_KEY set.
"""

import os
from typing import TypedDict

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

model = ChatOpenAI(
    model=os.environ.get("OPENAI_MODEL", "gpt-4o-mini"),
    api_key=os.environ.get("OPENAI_API_KEY", "not-set"),
)

DIRECT_PROMPT = "Solve the problem step by step. End with the answer in \\boxed{}."
CAREFUL_PROMPT = (
    "Name the method that fits the problem, solve it with that method, and test the result. End "
    "with the answer in \\boxed{}."
)
EDITOR_PROMPT = (
    "Two solutions of a problem follow. Find out which is right, or correct them. End with the "
    "answer in \\boxed{}."
)


class Problem(TypedDict):
    """What the app is asked."""

    problem: str


class State(Problem, total=False):
    """What the agents share."""

    first: str
    second: str
    answer: str


def direct(state: State) -> dict[str, str]:
    """Solve the problem, without seeing what the other solver does."""
    reply = model.invoke([SystemMessage(DIRECT_PROMPT), HumanMessage(state["problem"])])
    return {"first": reply.text}


def careful(state: State) -> dict[str, str]:
    """Solve the problem, without seeing what the other solver does."""
    reply = model.invoke([SystemMessage(CAREFUL_PROMPT), HumanMessage(state["problem"])])
    return {"second": reply.text}


def editor(state: State) -> dict[str, str]:
    """Read the problem and both solutions, and answer."""
    task = f"{state['problem']}\n\nFirst:\n{state['first']}\n\nSecond:\n{state['second']}"
    reply = model.invoke([SystemMessage(EDITOR_PROMPT), HumanMessage(task)])
    return {"answer": reply.text}


builder = StateGraph(State, input_schema=Problem)
for node in (direct, careful, editor):
    builder.add_node(node.__name__, node)
builder.add_edge(START, "direct")
builder.add_edge(START, "careful")
builder.add_edge(["direct", "careful"], "editor")
builder.add_edge("editor", END)
graph = builder.compile()
