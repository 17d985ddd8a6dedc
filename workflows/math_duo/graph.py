"""Two agents solve a word problem: a reasoner writes the calculation, an actor answers it.

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

REASONER_PROMPT = "Write the calculation."
ACTOR_PROMPT = "Answer with a number."


class State(TypedDict):
    """What the agents share."""

    question: str
    plan: str
    answer: str


def reasoner(state: State) -> dict[str, str]:
    """Read the problem and write down what is to be calculated."""
    reply = model.invoke([SystemMessage(REASONER_PROMPT), HumanMessage(state["question"])])
    return {"plan": reply.text}


def actor(state: State) -> dict[str, str]:
    """Read the problem and the reasoner's calculation, and answer."""
    task = f"{state['question']}\n{state['plan']}"
    reply = model.invoke([SystemMessage(ACTOR_PROMPT), HumanMessage(task)])
    return {"answer": reply.text}


builder = StateGraph(State)
builder.add_node("reasoner", reasoner)
builder.add_node("actor", actor)
builder.add_edge(START, "reasoner")
builder.add_edge("reasoner", "actor")
builder.add_edge("actor", END)
graph = builder.compile()
