"""`constrain_output` from the setting to the bound app, on an app that asks for structure."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph
from pydantic import BaseModel, Field

from marft_graph import Episode, TrainConfig, Trainer, bind, run_episodes
from marft_graph.deploy.manifest import read_manifest, sealed
from marft_graph.engine.fake import FakeEngine
from marft_graph.engine.local import LocalEngine
from marft_graph.errors import ConfigError
from marft_graph.evaluation import evaluate_export
from marft_graph.policy.adapters import Policy
from marft_graph.rollout.answers import request_for
from marft_graph.rollout.responder import InterceptedCall
from marft_graph.run.trajectories import read_traces
from tests.apps import DuoState, Move, duo, mover
from tests.support import make_agents, save_random_model

pytest.importorskip("xgrammar")

EXAMPLES = [{"question": "q" * (1 + i)} for i in range(6)]
SCHEMA = json.dumps(Move.model_json_schema())


def reward(example: Any, state: Any) -> float:
    return state["move"].steps / 1000 + len(state["answer"]) / 100


def config(model: Path, **changes: Any) -> TrainConfig:
    settings = {
        "base_model": str(model),
        "iterations": 2,
        "examples_per_iteration": 2,
        "group_size": 4,
        "max_new_tokens": 100,
        "learning_rate": 1e-3,
        "eval_examples": 2,
        "device": "cpu",
        "constrain_output": True,
    }
    return TrainConfig(**{**settings, **changes})


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[LocalEngine]:
    agents = make_agents(("mover", "teller", "planner", "actor"), tiny_model)
    made = LocalEngine(Policy.load(str(tiny_model), agents))
    yield made
    made.close()


def sampled(episodes: list[Episode]) -> list[tuple[Any, ...]]:
    """What was sampled, to the last bit."""
    return [
        (e.status, *((c.prompt_ids, c.completion_ids, c.logprobs, c.seed) for c in e.calls))
        for e in episodes
    ]


def test_an_app_with_structured_output_trains_and_is_bound(
    tiny_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with Trainer(
        mover(),
        train_dataset=EXAMPLES,
        eval_dataset=EXAMPLES,
        reward=reward,
        config=config(tiny_model),
        run_dir=run,
    ) as trainer:
        result = trainer.train(progress=False)
    metrics = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in metrics]
    assert [row["episodes_failed"] for row in rows] == [0, 0]
    for row in rows:
        assert row["agents"]["mover"]["logprob_gap"] < 1e-4
        assert row["agents"]["mover"]["truncated_share"] == 0
    for path in sorted((run / "traces").glob("*.parquet")):
        for episode in read_traces(path):
            first, second = episode.calls
            assert (first.grammar, second.grammar) == (SCHEMA, "")
            Move.model_validate_json(first.messages[-1]["content"])

    assert read_manifest(result.export).constrain_output
    app = bind(mover(), result.export, temperature=1.0)
    assert all(isinstance(app.invoke(example)["move"], Move) for example in EXAMPLES)
    settings = config(tiny_model, constrain_output=False)  # the export knows better
    found = evaluate_export(mover(), result.export, EXAMPLES, reward=reward, config=settings)
    assert found.episodes_failed == 0

    manifest = result.export / "manifest.json"
    older = json.loads(manifest.read_text(encoding="utf-8"))
    del older["constrain_output"]
    manifest.write_bytes(sealed(older))
    assert not read_manifest(result.export).constrain_output


def test_without_the_setting_nothing_is_constrained(engine: LocalEngine) -> None:
    episodes = run_episodes(mover(), EXAMPLES, engine=engine, max_new_tokens=40)
    assert {e.status for e in episodes} == {"failed: StructuredOutputError in mover"}
    assert {c.grammar for e in episodes for c in e.calls} == {""}


@pytest.mark.parametrize("greedy", [False, True])
def test_calls_that_ask_for_no_structure_are_the_same_with_it(
    engine: LocalEngine, greedy: bool
) -> None:
    free, held = (
        run_episodes(
            duo(),
            EXAMPLES,
            engine=engine,
            group_size=2,
            max_new_tokens=20,
            greedy=greedy,
            constrain_output=constrain,
        )
        for constrain in (False, True)
    )
    assert sampled(free) == sampled(held)


def test_an_engine_that_cannot_constrain_says_so_in_the_calls() -> None:
    engine = FakeEngine(
        {"mover": '{"kind": "go", "steps": 1, "place": {"row": 2, "side": "left"}}', "teller": "x"}
    )
    (episode,) = run_episodes(mover(), EXAMPLES[:1], engine=engine, constrain_output=True)
    engine.close()
    assert episode.ok
    assert engine.requests[0].grammar == SCHEMA
    assert [call.grammar for call in episode.calls] == ["", ""]


def test_a_missing_library_is_named_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(ConfigError, match=r"pip install 'marft-graph\[grammar\]'"):
        Trainer(
            mover(),
            train_dataset=EXAMPLES,
            reward=reward,
            config=config(tmp_path / "no model"),
            run_dir=tmp_path / "run",
        )


def grammar_of(**asked: Any) -> str:
    call = InterceptedCall("a", "a", "a:1", 1, (), (HumanMessage("hi"),), **asked)
    codec = FakeEngine("x").codec("a")
    assert request_for(call, codec).grammar == ""
    return request_for(call, codec, constrain_output=True).grammar


def test_every_way_to_name_a_schema_is_understood() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    openai = {"type": "json_schema", "json_schema": {"name": "N", "schema": schema}}
    for response_format in (schema, openai):
        assert json.loads(grammar_of(response_format=response_format)) == schema
    assert grammar_of(response_format=Move) == SCHEMA
    assert grammar_of(response_format=None) == grammar_of(response_format={"type": "text"}) == ""


def test_a_call_that_may_use_a_tool_stays_free() -> None:
    tools = ({"type": "function", "function": {"name": "add", "parameters": {}}},)
    assert grammar_of(response_format=Move, tools=tools) == ""
    assert grammar_of(response_format=Move, tools=tools, tool_choice="none") == SCHEMA


def test_structure_without_a_json_schema_names_its_node() -> None:
    class Odd(BaseModel):
        model_config = {"arbitrary_types_allowed": True}
        tensor: torch.Tensor

    with pytest.raises(ConfigError, match="node 'a' asks for has no JSON schema"):
        grammar_of(response_format=Odd)


class Sum(BaseModel):
    """A sum."""

    number: int = Field(ge=0, le=99)
    is_sure: bool


def summer() -> Any:
    """A node that forces a tool call and fails without one."""

    def add(state: DuoState) -> dict[str, str]:
        asked = openai.with_structured_output(Sum, method="function_calling")
        made = asked.invoke(state["question"])
        return {"answer": str(made.number)}  # type: ignore[union-attr]

    return StateGraph(DuoState).add_node("summer", add).add_edge(START, "summer").compile()


openai = ChatOpenAI(model="gpt-4o", api_key="x", base_url="http://127.0.0.1:9")  # type: ignore[arg-type]


def test_a_forced_tool_call_trains_and_is_bound_and_its_masks_agree(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", context=1024)
    with Trainer(
        summer(),
        train_dataset=EXAMPLES,
        reward=lambda example, state: int(state["answer"]) / 100,
        config=config(model, max_new_tokens=120),
        run_dir=tmp_path / "run",
    ) as trainer:
        result = trainer.train(progress=False)
    rows = [
        json.loads(line)
        for line in (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [row["episodes_failed"] for row in rows] == [0, 0]
    assert all(row["agents"]["summer"]["logprob_gap"] < 1e-4 for row in rows)
    calls = [
        call
        for path in sorted((tmp_path / "run" / "traces").glob("*.parquet"))
        for episode in read_traces(path)
        for call in episode.calls
    ]
    assert all(call.grammar and call.messages[-1]["tool_calls"] for call in calls)
    app = bind(summer(), result.export, temperature=1.0)
    assert all(0 <= int(app.invoke(example)["answer"]) <= 99 for example in EXAMPLES)


def test_the_prompt_has_the_schema_in_training_and_when_bound(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", context=1024)
    with Trainer(
        mover(),
        train_dataset=EXAMPLES,
        reward=reward,
        config=config(model, iterations=1),
        run_dir=tmp_path / "run",
    ) as trainer:
        result = trainer.train(progress=False)
    (path,) = sorted((tmp_path / "run" / "traces").glob("*.parquet"))
    first = next(iter(read_traces(path))).calls[0]
    assert "Answer with JSON that fits this schema" in first.messages[0]["content"]
    assert '"steps"' in first.messages[0]["content"]
    assert read_manifest(result.export).schema_in_prompt
    asked: list[tuple[int, ...]] = []
    submit = LocalEngine.submit

    def watched(self: LocalEngine, request: Any) -> Any:
        asked.append(request.prompt_ids)
        return submit(self, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalEngine, "submit", watched)
        bind(mover(), result.export).invoke(dict(first_example(path)))
    assert first.prompt_ids in asked


def first_example(path: Path) -> Any:
    return next(iter(read_traces(path))).example
