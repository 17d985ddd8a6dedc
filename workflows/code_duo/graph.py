"""A coder writes Python for a task, a tester reads the task and the code and writes a test.

Nothing is run here: what becomes of code and test is for whoever calls the app. An ordinary
LangGraph app around an API model. Run it as it is with OPENAI_API_KEY set.
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

CODER_PROMPT = "Write Python."
TESTER_PROMPT = "Test the code."


class Task(TypedDict):
    """What the app is asked."""

    task: str


class State(Task, total=False):
    """What the agents share."""

    code: str
    test: str


def coder(state: State) -> dict[str, str]:
    """Read the task and write the code."""
    reply = model.invoke([SystemMessage(CODER_PROMPT), HumanMessage(state["task"])])
    return {"code": reply.text}


def tester(state: State) -> dict[str, str]:
    """Read the task and the code, and write a test that right code passes and wrong code fails."""
    shown = f"{state['task']}\n{state['code']}"
    reply = model.invoke([SystemMessage(TESTER_PROMPT), HumanMessage(shown)])
    return {"test": reply.text}


builder = StateGraph(State, input_schema=Task)
builder.add_node("coder", coder)
builder.add_node("tester", tester)
builder.add_edge(START, "coder")
builder.add_edge("coder", "tester")
builder.add_edge("tester", END)
graph = builder.compile()
