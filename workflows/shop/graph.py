"""Two agents in a small web shop: a planner says what to do next, a shopper searches, clicks, buys.

An ordinary LangGraph app around an API model. Run it as it is with OPENAI_API_KEY set.
"""

import os
import re
from itertools import product
from typing import TypedDict

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

model = ChatOpenAI(
    model=os.environ.get("OPENAI_MODEL", "gpt-4o-mini"),
    api_key=os.environ.get("OPENAI_API_KEY", "not-set"),
)

PLANNER_PROMPT = "You plan a purchase. Say in a few words what to do next."
SHOPPER_PROMPT = "You shop. Write one command: search[words], click[number], back or buy."
THINGS = ("bag", "cap", "cup", "lamp", "pen", "sock")
COLOURS = ("red", "blue", "green", "black")
SIZES = ("small", "large")
MOST_STEPS = 8
HOME = "Shop. You can: search[words]"
CATALOGUE = tuple(
    {"thing": thing, "colour": colour, "size": size, "price": 3 + (7 * number) % 29}
    for number, (thing, colour, size) in enumerate(product(THINGS, COLOURS, SIZES))
)


class Request(TypedDict):
    """What the customer wants: `a large red cup for at most 20`."""

    request: str


class State(TypedDict, total=False):
    """What the agents share, and where in the shop they are."""

    request: str
    page: str
    results: list[int]
    open: int | None
    bought: int | None
    plan: str
    command: str
    steps: int
    is_over: bool


def planner(state: State) -> State:
    """Read the request and the page, and say what to do next."""
    task = f"Wanted: {state['request']}\n{state['page']}"
    return {"plan": model.invoke([SystemMessage(PLANNER_PROMPT), HumanMessage(task)]).text}


def shopper(state: State) -> State:
    """Read the plan and the page, and write a command."""
    task = f"{state['page']}\nPlan: {state['plan']}"
    return {"command": model.invoke([SystemMessage(SHOPPER_PROMPT), HumanMessage(task)]).text}


def shop(state: State) -> State:
    """Do what the command says; no model is called."""
    if "steps" not in state:
        return {"page": HOME, "steps": 0, "results": [], "open": None, "is_over": False}
    steps = state["steps"] + 1
    changed = _done(state, state["command"].strip().lower())
    is_over = steps >= MOST_STEPS or changed.get("bought") is not None
    return {**changed, "steps": steps, "is_over": is_over}


def _done(state: State, command: str) -> State:
    """What a command changes; one that the shop does not know changes only what the page says."""
    found = re.fullmatch(r"(search|click)\[(.*)\]", command)
    if found and found[1] == "search":
        words = found[2].split()
        results = [
            place
            for place, item in enumerate(CATALOGUE)
            if words
            and all(word in (item["thing"], item["colour"], item["size"]) for word in words)
        ][:8]
        return {"page": _results_page(results), "results": results, "open": None}
    if found and found[2].isdigit() and 1 <= int(found[2]) <= len(state["results"]):
        place = state["results"][int(found[2]) - 1]
        page = f"{described(place)}. You can: buy, back"
        return {"page": page, "open": place}
    if command == "back" and state["open"] is not None:
        return {"page": _results_page(state["results"]), "open": None}
    if command == "buy" and state["open"] is not None:
        return {"page": f"Bought: {described(state['open'])}", "bought": state["open"]}
    return {"page": f"{HOME}\n(there was no {command[:20]!r} here)", "results": [], "open": None}


def described(place: int) -> str:
    """An item of the catalogue in words."""
    item = CATALOGUE[place]
    return f"{item['size']} {item['colour']} {item['thing']}, {item['price']}"


def _results_page(results: list[int]) -> str:
    lines = [f"{number}: {described(place)}" for number, place in enumerate(results, 1)]
    return "\n".join([*(lines or ["Nothing found."]), "You can: click[number], search[words]"])


def goes_on(state: State) -> str:
    """The planner's turn, unless something was bought or the time is over."""
    return END if state["is_over"] else "planner"


builder = StateGraph(State, input_schema=Request)
for node in (shop, planner, shopper):
    builder.add_node(node.__name__, node)
builder.add_edge(START, "shop")
builder.add_conditional_edges("shop", goes_on, ["planner", END])
builder.add_edge("planner", "shopper")
builder.add_edge("shopper", "shop")
graph = builder.compile().with_config(recursion_limit=3 * (MOST_STEPS + 1))
