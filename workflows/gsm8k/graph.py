"""Two agents solve a word problem: a solver works it out, a checker goes over it and answers.

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

SOLVER_PROMPT = "Solve the problem step by step. Keep each step to one line."
CHECKER_PROMPT = (
    "Check the solution and correct what is wrong in it. End with a line of four hashes and the "
    "answer as a number, such as: #### 42"
)


class Question(TypedDict):
    """What the app is asked."""

    question: str


class State(Question, total=False):
    """What the agents share."""

    solution: str
    answer: str


def solver(state: State) -> dict[str, str]:
    """Read the problem and work it out."""
    reply = model.invoke([SystemMessage(SOLVER_PROMPT), HumanMessage(state["question"])])
    return {"solution": reply.text}


def checker(state: State) -> dict[str, str]:
    """Read the problem and the solution, and answer."""
    task = f"{state['question']}\n\nSolution:\n{state['solution']}"
    reply = model.invoke([SystemMessage(CHECKER_PROMPT), HumanMessage(task)])
    return {"answer": reply.text}


builder = StateGraph(State, input_schema=Question)
builder.add_node("solver", solver)
builder.add_node("checker", checker)
builder.add_edge(START, "solver")
builder.add_edge("solver", "checker")
builder.add_edge("checker", END)
graph = builder.compile()
