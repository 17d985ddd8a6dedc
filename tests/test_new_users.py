"""Apps that a reader brings along: trained, looked at and served by at most 15 lines of theirs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BASE = Path(__file__).parents[1] / "workflows" / "tiny_base"

# Models from a paid API, made inside a function and held by closures.
CLOSURES = """
from typing import TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph


class State(TypedDict, total=False):
    ticket: str
    topic: str
    reply: str


def make_graph():
    fast, strong = ChatOpenAI(model="gpt-4o-mini"), ChatOpenAI(model="gpt-4o", temperature=0.3)

    def triage(state: State) -> State:
        topic = fast.invoke([("system", "Name the topic."), ("user", state["ticket"])]).text
        return {"topic": topic}

    def answer(state: State) -> State:
        return {"reply": strong.invoke(f"{state['topic']}: {state['ticket']}").text}

    builder = StateGraph(State)
    builder.add_node("triage", triage)
    builder.add_node("answer", answer)
    builder.add_edge(START, "triage")
    builder.add_edge("triage", "answer")
    builder.add_edge("answer", END)
    return builder.compile()


graph = make_graph()
"""

TRAIN_CLOSURES = """
from marft_graph import TrainConfig, Trainer, bind
from my_app import graph

tickets = [{"ticket": f"Order {n} is late", "topic_is": "late"} for n in range(40)]

def reward(example, state):
    return float(example["topic_is"] in state["topic"]) + 0.1 * len(set(state["reply"])) / 26

config = TrainConfig(base_model=BASE, iterations=2, examples_per_iteration=2, max_new_tokens=8)
with Trainer(graph, train_dataset=tickets, reward=reward, config=config) as trainer:
    result = trainer.train()
print(result.report, sorted(trainer.nodes))
print(bind(graph, result.export).invoke({"ticket": "Order 7 is late"})["reply"])
"""

# LangChain's agent loop with tools, and an answer in a given form.
AGENT = """
from langchain.agents import create_agent
from langchain.agents.structured_output import ToolStrategy
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Weather(BaseModel):
    \"\"\"What the weather is.\"\"\"

    city: str
    degrees: int


@tool
def look_up(city: str) -> str:
    \"\"\"Look up the temperature of a city.\"\"\"
    return f"{city}: {len(city)} degrees"


model = ChatOpenAI(model="gpt-4o-mini")
graph = create_agent(model, [look_up], response_format=ToolStrategy(Weather))
"""

TRAIN_AGENT = """
from marft_graph import TrainConfig, Trainer, bind
from my_app import graph

cities = [{"messages": [("user", f"How warm is {city}?")]} for city in ("Oslo", "Rome", "Lima")]

def reward(example, state):
    found = state.get("structured_response")
    return 1.0 if found else 0.1 * state["messages"][-1].text.count("e")

config = TrainConfig(base_model=BASE, iterations=2, examples_per_iteration=2, max_new_tokens=16)
with Trainer(graph, train_dataset=cities, reward=reward, config=config) as trainer:
    result = trainer.train()
print(result.report, sorted(trainer.nodes))
print(bind(graph, result.export).invoke(cities[0])["messages"][-1].type)
"""

# A graph inside a graph, and as many branches as there are chapters.
BRANCHES = """
import operator
from typing import Annotated, TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send

llm = ChatOpenAI(model="gpt-4o-mini")


class Chapter(TypedDict, total=False):
    title: str
    text: str


class Book(TypedDict, total=False):
    theme: str
    titles: list[str]
    chapters: Annotated[list[str], operator.add]
    blurb: str


def write(state: Chapter) -> Chapter:
    return {"text": llm.invoke(f"Write: {state['title']}").text}


def polish(state: Chapter) -> Chapter:
    return {"text": llm.invoke(f"Polish: {state['text']}").text}


writer = StateGraph(Chapter)
writer.add_node("write", write)
writer.add_node("polish", polish)
writer.add_edge(START, "write")
writer.add_edge("write", "polish")
writer.add_edge("polish", END)
chapter = writer.compile()


def plan(state: Book) -> Book:
    return {"titles": [f"{state['theme']} {n}" for n in (1, 2)]}


def each(state: Book) -> list[Send]:
    return [Send("chapter", {"title": title}) for title in state["titles"]]


def run_chapter(state: Chapter) -> Book:
    return {"chapters": [chapter.invoke(state)["text"]]}


def blurb(state: Book) -> Book:
    return {"blurb": llm.invoke("\\n".join(state["chapters"])).text}


builder = StateGraph(Book)
builder.add_node("plan", plan)
builder.add_node("chapter", run_chapter)
builder.add_node("blurb", blurb)
builder.add_edge(START, "plan")
builder.add_conditional_edges("plan", each, ["chapter"])
builder.add_edge("chapter", "blurb")
builder.add_edge("blurb", END)
graph = builder.compile()
"""

TRAIN_BRANCHES = """
from marft_graph import TrainConfig, Trainer, bind
from my_app import graph

themes = [{"theme": theme} for theme in ("sea", "sand", "snow", "stone")]

def reward(example, state):
    return state["blurb"].count("s") - 0.01 * sum(map(len, state["chapters"]))

config = TrainConfig(base_model=BASE, iterations=2, examples_per_iteration=2, max_new_tokens=8)
with Trainer(graph, train_dataset=themes, reward=reward, config=config) as trainer:
    result = trainer.train()
print(result.report, sorted(trainer.nodes))
print(len(bind(graph, result.export).invoke({"theme": "sun"})["chapters"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("app", "script", "nodes", "said"),
    [
        (CLOSURES, TRAIN_CLOSURES, ["answer", "triage"], None),
        (AGENT, TRAIN_AGENT, ["model"], "ai"),
        (BRANCHES, TRAIN_BRANCHES, ["blurb", "chapter/polish", "chapter/write"], "2"),
    ],
    ids=["closures over ChatOpenAI", "create_agent", "subgraphs and Send"],
)
def test_a_readers_own_app_is_trained_and_served(
    app: str, script: str, nodes: list[str], said: str | None, tmp_path: Path
) -> None:
    own_lines = [line for line in script.splitlines() if line.strip()]
    assert len(own_lines) <= 15
    (tmp_path / "my_app.py").write_text(app)
    (tmp_path / "train.py").write_text(script.replace("BASE", repr(str(BASE))))
    done = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "OPENAI_API_KEY": "none", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report, answer = done.stdout.splitlines()[-2:]
    page = tmp_path / report.split(" [")[0]
    assert page.name == "report.html"
    assert "<svg" in page.read_text(encoding="utf-8")
    assert report.endswith(str(nodes))
    assert said is None or answer == said
