"""Adapters back in the app, in a new process, exactly as the trainer measured them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessageChunk
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command, interrupt

from marft_graph import TrainConfig, Trainer, bind
from marft_graph.errors import ConfigError, ExportError
from tests.apps import DuoState, duo, voters
from tests.apps import model as own_model

EXAMPLES = [{"question": "q" * (1 + i)} for i in range(8)]
SCRIPT = """
import json, sys
from marft_graph import bind
from tests.apps import duo

app = bind(duo(sync=True), sys.argv[1])
print(json.dumps([app.invoke(example)["answer"] for example in json.loads(sys.argv[2])]))
"""


def reward(example: Any, state: Any) -> float:
    return sum(map(ord, state["answer"])) / 1000


@pytest.fixture
def exported(tiny_model: Path, tmp_path: Path) -> tuple[Path, Trainer]:
    settings = TrainConfig(
        base_model=str(tiny_model),
        iterations=2,
        examples_per_iteration=2,
        group_size=4,
        max_new_tokens=8,
        learning_rate=1e-2,
        advantage="group",
        device="cpu",
    )
    trainer = Trainer(
        duo(sync=True),
        train_dataset=EXAMPLES,
        eval_dataset=EXAMPLES,
        reward=reward,
        config=settings,
        run_dir=tmp_path / "run",
    )
    trainer.train(progress=False)
    return trainer.export(tmp_path / "out"), trainer


def test_a_new_process_reproduces_the_greedy_return(exported: tuple[Path, Trainer]) -> None:
    folder, trainer = exported
    expected = trainer.evaluate(greedy=True).returns
    command = [sys.executable, "-c", SCRIPT, str(folder), json.dumps(EXAMPLES)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout)
    assert tuple(reward(None, {"answer": answer}) for answer in answers) == expected


async def test_all_ways_to_run_the_app_answer_alike(exported: tuple[Path, Trainer]) -> None:
    app = bind(duo(sync=True), exported[0])
    expected = app.invoke(EXAMPLES[0])
    assert await app.ainvoke(EXAMPLES[0]) == expected
    assert list(app.stream(EXAMPLES[0], stream_mode="values"))[-1] == expected
    assert [s async for s in app.astream(EXAMPLES[0], stream_mode="values")][-1] == expected
    assert app.batch(EXAMPLES[:3]) == [app.invoke(example) for example in EXAMPLES[:3]]


def test_a_task_that_asks_the_same_several_times_gets_several_samples(
    exported: tuple[Path, Trainer],
) -> None:
    said: list[str] = []

    def ask(state: dict[str, Any]) -> dict[str, Any]:
        one_by_one = [own_model.invoke("write something") for _ in range(4)]
        together = own_model.batch(["write something"] * 4)
        said[:] = [message.text for message in (*one_by_one, *together)]
        return {"answer": "done"}

    graph = StateGraph(DuoState).add_node("planner", lambda state: {}).add_node("actor", ask)
    app = graph.add_edge(START, "planner").add_edge("planner", "actor").compile()
    bind(app, exported[0], temperature=1.0).invoke({"question": "q"})
    assert len(set(said)) == 8
    bind(app, exported[0]).invoke({"question": "q"})
    assert len(set(said)) == 1


def test_a_task_that_is_run_again_samples_as_before(exported: tuple[Path, Trainer]) -> None:
    """A run that was interrupted repeats its node, and what the node asked, from its beginning."""
    asked: list[list[str]] = []

    def ask(state: dict[str, Any]) -> dict[str, Any]:
        asked.append([own_model.invoke("write something").text for _ in range(3)])
        interrupt("go on?")
        return {"answer": "".join(asked[-1])}

    graph = StateGraph(DuoState).add_node("planner", lambda state: {}).add_node("actor", ask)
    app = graph.add_edge(START, "planner").add_edge("planner", "actor")
    sampling = bind(app.compile(checkpointer=InMemorySaver()), exported[0], temperature=1.0)
    for thread in ("1", "2"):
        settings: RunnableConfig = {"configurable": {"thread_id": thread}}
        sampling.invoke({"question": "q"}, settings)
        sampling.invoke(Command(resume=True), settings)
    assert asked[0] == asked[1] != asked[2] == asked[3]
    assert len(set(asked[0])) == 3


@pytest.mark.usefixtures("untouched_langchain")
def test_binding_leaves_langchain_and_the_app_as_they_were(
    exported: tuple[Path, Trainer],
) -> None:
    before = dict(vars(BaseChatModel))
    stream = bind(duo(sync=True), exported[0]).stream(EXAMPLES[0])
    next(stream)
    stream.close()
    assert dict(vars(BaseChatModel)) == before


def test_a_damaged_or_foreign_export_is_named(exported: tuple[Path, Trainer]) -> None:
    folder, _ = exported
    with pytest.raises(ExportError, match=r"another graph.*no agent.*voter, aggregator"):
        bind(voters(), folder)
    weights = folder / "adapters" / "actor" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ExportError, match=r"damaged: adapters/actor/adapter_model\.safetensors"):
        bind(duo(sync=True), folder)
    weights.unlink()
    with pytest.raises(ExportError, match="is missing"):
        bind(duo(sync=True), folder)
    with pytest.raises(ExportError, match="no export folder"):
        bind(duo(sync=True), folder.parent)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1.0), ("share", 1.5), ("timeout", 0.0), ("device", "cuda:99")],
)
def test_what_cannot_be_is_refused_when_the_app_is_bound(
    exported: tuple[Path, Trainer], name: str, value: Any
) -> None:
    with pytest.raises(ConfigError, match=f"{name} is .*{value}"):
        bind(duo(sync=True), exported[0], **{name: value})


async def test_a_bound_app_streams_its_answers_in_chunks(exported: tuple[Path, Trainer]) -> None:
    app = bind(duo(sync=True), exported[0])
    example = {"question": "q"}
    whole = app.invoke(example)["answer"]
    assert whole.strip(), "the adapters must say something for this test to mean anything"

    items: list[Any] = list(app.stream(example, stream_mode="messages"))
    assert all(isinstance(chunk, AIMessageChunk) for chunk, _ in items)
    last = [chunk.text for chunk, known in items if known["langgraph_node"] == "actor"]
    assert "".join(last) == whole
    ids = {chunk.id for chunk, known in items if known["langgraph_node"] == "actor"}
    assert len(ids) == 1

    items = [item async for item in app.astream(example, stream_mode="messages")]
    assert "".join(c.text for c, known in items if known["langgraph_node"] == "actor") == whole

    events = [event async for event in app.compiled.astream_events(example, version="v2")]
    texts = [
        event["data"]["chunk"].text
        for event in events
        if event["event"] == "on_chat_model_stream"
        and event["metadata"]["langgraph_node"] == "actor"
    ]
    assert "".join(texts) == whole
    ends = [event for event in events if event["event"] == "on_chat_model_end"]
    assert len(ends) == 2
