"""A supervisor names who works next, a reasoner or an actor, until it says that they are done.

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

SUPERVISOR_PROMPT = "Who is next?"
REASONER_PROMPT = "Write the calculation."
ACTOR_PROMPT = "Answer with a number."
MOST_TURNS = 4
"""Workers' turns after which the work ends whatever the supervisor says."""


class Question(TypedDict):
    """What the app is asked."""

    question: str


class State(TypedDict, total=False):
    """What the agents share."""

    question: str
    done: list[str]
    following: str
    plan: str
    answer: str


def supervisor(state: State) -> State:
    """Read the problem and who has worked on it, and name the next worker or FINISH."""
    done = ", ".join(state.get("done", [])) or "nothing"
    task = f"{state['question']}\nDone: {done}"
    reply = model.invoke([SystemMessage(SUPERVISOR_PROMPT), HumanMessage(task)])
    return {"following": reply.text.strip()}


def reasoner(state: State) -> State:
    """Read the problem and write down what is to be calculated."""
    reply = model.invoke([SystemMessage(REASONER_PROMPT), HumanMessage(state["question"])])
    return {"plan": reply.text, "done": [*state.get("done", []), "reasoner"]}


def actor(state: State) -> State:
    """Read the problem and the reasoner's calculation, and answer."""
    task = f"{state['question']}\n{state.get('plan', '')}"
    reply = model.invoke([SystemMessage(ACTOR_PROMPT), HumanMessage(task)])
    return {"answer": reply.text, "done": [*state.get("done", []), "actor"]}


def chosen(state: State) -> str:
    """The worker that the supervisor named; a name that nobody has ends the work."""
    names = ("reasoner", "actor")
    is_open = len(state.get("done", [])) < MOST_TURNS
    return state["following"] if is_open and state["following"] in names else END


builder = StateGraph(State, input_schema=Question)
for node in (supervisor, reasoner, actor):
    builder.add_node(node.__name__, node)
builder.add_edge(START, "supervisor")
builder.add_conditional_edges("supervisor", chosen, ["reasoner", "actor", END])
builder.add_edge("reasoner", "supervisor")
builder.add_edge("actor", "supervisor")
graph = builder.compile()
