"""Three agents and a loop: a reasoner and an actor solve a word problem, a verifier approves it.

What the verifier does not approve goes back to the reasoner. An ordinary LangGraph app around an
API model. Run it as it is with OPENAI_API_KEY set.
"""

import os
from typing import Literal, TypedDict

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

model = ChatOpenAI(
    model=os.environ.get("OPENAI_MODEL", "gpt-4o-mini"),
    api_key=os.environ.get("OPENAI_API_KEY", "not-set"),
)

REASONER_PROMPT = "Write the calculation."
ACTOR_PROMPT = "Answer with a number."
VERIFIER_PROMPT = "Check it."
MAX_ROUNDS = 2


class State(TypedDict):
    """What the agents share."""

    question: str
    plan: str
    draft: str
    rounds: int
    approved: bool


def reasoner(state: State) -> dict[str, str]:
    """Read the problem and write down what is to be calculated."""
    reply = model.invoke([SystemMessage(REASONER_PROMPT), HumanMessage(state["question"])])
    return {"plan": reply.text}


def actor(state: State) -> dict[str, str]:
    """Read the problem and the reasoner's calculation, and answer."""
    task = f"{state['question']}\n{state['plan']}"
    reply = model.invoke([SystemMessage(ACTOR_PROMPT), HumanMessage(task)])
    return {"draft": reply.text}


def verifier(state: State) -> dict[str, int | bool]:
    """Read the calculation with its result, and approve it with a yes."""
    work = f"{state['plan']}={state['draft']}"
    reply = model.invoke([SystemMessage(VERIFIER_PROMPT), HumanMessage(work)])
    approved = reply.text.strip().lower() == "yes"
    return {"approved": approved, "rounds": state.get("rounds", 0) + 1}


def after_verifier(state: State) -> Literal["reasoner", "__end__"]:
    """Another round for what was not approved, at most MAX_ROUNDS in all."""
    return END if state["approved"] or state["rounds"] >= MAX_ROUNDS else "reasoner"


builder = StateGraph(State)
builder.add_node("reasoner", reasoner)
builder.add_node("actor", actor)
builder.add_node("verifier", verifier)
builder.add_edge(START, "reasoner")
builder.add_edge("reasoner", "actor")
builder.add_edge("actor", "verifier")
builder.add_conditional_edges("verifier", after_verifier)
graph = builder.compile()
