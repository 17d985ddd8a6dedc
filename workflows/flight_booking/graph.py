"""Five agents book a flight: an orchestrator, a calendar and a location agent, ticket, reflection.

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

ORCHESTRATOR_PROMPT = "You lead a team that books flights. Say in one line what is asked for."
CALENDAR_PROMPT = "Name the day of the flight: mon, tue, wed, thu or fri."
LOCATION_PROMPT = "Name the two airports as FROM-TO, such as OSL-ROM."
TICKET_PROMPT = "Pick one of the flights. Write its number only."
REFLECTION_PROMPT = "Does the booking fit the request? Write yes, or no and why."
CITIES = {"Oslo": "OSL", "Rome": "ROM", "Paris": "PAR", "Cairo": "CAI"}
DAYS = ("mon", "tue", "wed", "thu", "fri")
MOST_BOOKINGS = 2
FLIGHTS = tuple(
    {
        "number": f"MF{number:03}",
        "route": f"{start}-{end}",
        "day": day,
        "price": 60 + (37 * number) % 240,
    }
    for number, (start, end, day, _) in enumerate(
        (start, end, day, part)
        for start in CITIES.values()
        for end in CITIES.values()
        if start != end
        for day in DAYS
        for part in ("morning", "evening")
    )
)


class Request(TypedDict):
    """What the traveller wants: `the cheapest flight from Oslo to Rome on wed`."""

    request: str


class State(TypedDict, total=False):
    """What the agents share."""

    request: str
    brief: str
    day: str
    route: str
    offers: str
    booked: str
    review: str
    bookings: int


def _ask(prompt: str, *lines: str) -> str:
    return model.invoke([SystemMessage(prompt), HumanMessage("\n".join(lines))]).text.strip()


def orchestrator(state: State) -> State:
    """Say what is asked for; after a review that found fault, with what it found."""
    lines = [state["request"], *([f"Review: {state['review']}"] if "review" in state else [])]
    return {"brief": _ask(ORCHESTRATOR_PROMPT, *lines)}


def calendar(state: State) -> State:
    """The day of the flight."""
    return {"day": _ask(CALENDAR_PROMPT, state["request"], state["brief"])}


def location(state: State) -> State:
    """The two airports."""
    return {"route": _ask(LOCATION_PROMPT, state["request"], state["brief"])}


def search(state: State) -> State:
    """The flights of the day on the route; no model is called."""
    day, route = state["day"].lower(), state["route"].upper()
    found = [f for f in FLIGHTS if f["day"] == day and f["route"] == route]
    return {"offers": "\n".join(f"{f['number']}: {f['price']}" for f in found) or "no flight"}


def ticket(state: State) -> State:
    """Pick a flight."""
    number = _ask(TICKET_PROMPT, state["request"], state["offers"])
    return {"booked": number, "bookings": state.get("bookings", 0) + 1}


def reflection(state: State) -> State:
    """Look at the booking once more."""
    found = [f for f in FLIGHTS if f["number"] == state["booked"]]
    shown = str(found[0]) if found else f"no such flight: {state['booked'][:20]}"
    return {"review": _ask(REFLECTION_PROMPT, state["request"], shown)}


def accepted(state: State) -> str:
    """Begin again where the review says no, once."""
    is_no = state["review"].lower().startswith("no")
    return "orchestrator" if is_no and state["bookings"] < MOST_BOOKINGS else END


builder = StateGraph(State, input_schema=Request)
for node in (orchestrator, calendar, location, search, ticket, reflection):
    builder.add_node(node.__name__, node)
builder.add_edge(START, "orchestrator")
builder.add_edge("orchestrator", "calendar")
builder.add_edge("orchestrator", "location")
builder.add_edge(["calendar", "location"], "search")
builder.add_edge("search", "ticket")
builder.add_edge("ticket", "reflection")
builder.add_conditional_edges("reflection", accepted, ["orchestrator", END])
graph = builder.compile()
