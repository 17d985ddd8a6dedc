"""Two debaters answer in parallel, and a judge rules: the answer stands where all three agree.

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

DEBATER_PROMPT = "Debate."
JUDGE_PROMPT = "Judge."
NO_AGREEMENT = "no agreement"


class State(TypedDict):
    """What the agents share."""

    question: str
    first: str
    second: str
    ruling: str
    answer: str


def debater_a(state: State) -> dict[str, str]:
    """Answer, without seeing what the other debater says."""
    reply = model.invoke([SystemMessage(DEBATER_PROMPT), HumanMessage(state["question"])])
    return {"first": reply.text}


def debater_b(state: State) -> dict[str, str]:
    """Answer, without seeing what the other debater says."""
    reply = model.invoke([SystemMessage(DEBATER_PROMPT), HumanMessage(state["question"])])
    return {"second": reply.text}


def judge(state: State) -> dict[str, str]:
    """Read the question with both answers, and rule."""
    case = f"{state['question']}\nA: {state['first']}\nB: {state['second']}"
    return {"ruling": model.invoke([SystemMessage(JUDGE_PROMPT), HumanMessage(case)]).text}


def settle(state: State) -> dict[str, str]:
    """The answer, if the judge and both debaters wrote the same; no model is called."""
    agreed = state["first"].strip() == state["second"].strip() == state["ruling"].strip()
    return {"answer": state["ruling"] if agreed else NO_AGREEMENT}


builder = StateGraph(State)
for node in (debater_a, debater_b, judge, settle):
    builder.add_node(node.__name__, node)
builder.add_edge(START, "debater_a")
builder.add_edge(START, "debater_b")
builder.add_edge(["debater_a", "debater_b"], "judge")
builder.add_edge("judge", "settle")
builder.add_edge("settle", END)
graph = builder.compile()
