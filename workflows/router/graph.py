"""A router names the specialist for a request; one of three specialists answers it.

A name that nobody has leads to an answer that says so. An ordinary LangGraph app around an API
model. Run it as it is with OPENAI_API_KEY set.
"""

import os
from collections.abc import Callable
from typing import TypedDict

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

model = ChatOpenAI(
    model=os.environ.get("OPENAI_MODEL", "gpt-4o-mini"),
    api_key=os.environ.get("OPENAI_API_KEY", "not-set"),
)

ROUTER_PROMPT = "Name a specialist."
SPECIALIST_PROMPTS = {
    "sum": "You do sum.",
    "reverse": "You do reverse.",
    "upper": "You do upper.",
}
NOBODY = "Nobody of that name works here."


class State(TypedDict):
    """What the agents share."""

    question: str
    specialist: str
    answer: str


def router(state: State) -> dict[str, str]:
    """Read the request and name who is to answer it."""
    reply = model.invoke([SystemMessage(ROUTER_PROMPT), HumanMessage(state["question"])])
    return {"specialist": reply.text.strip()}


def specialist(prompt: str) -> Callable[[State], dict[str, str]]:
    """A node that answers the request in its own way."""

    def answer(state: State) -> dict[str, str]:
        reply = model.invoke([SystemMessage(prompt), HumanMessage(state["question"])])
        return {"answer": reply.text}

    return answer


def nobody(state: State) -> dict[str, str]:
    """The request failed: the router named no specialist; no model is called."""
    return {"answer": NOBODY}


def named(state: State) -> str:
    """The node of the specialist that the router named."""
    return state["specialist"] if state["specialist"] in SPECIALIST_PROMPTS else "nobody"


builder = StateGraph(State)
builder.add_node("router", router)
builder.add_node("nobody", nobody)
builder.add_edge(START, "router")
builder.add_conditional_edges("router", named, [*SPECIALIST_PROMPTS, "nobody"])
builder.add_edge("nobody", END)
for name, prompt in SPECIALIST_PROMPTS.items():
    builder.add_node(name, specialist(prompt))
    builder.add_edge(name, END)
graph = builder.compile()
