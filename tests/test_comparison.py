"""Policies side by side: paired, with figures by node, costs, failures and what changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from langchain_core.messages import AIMessage
from langgraph.graph import START, StateGraph
from typing_extensions import TypedDict

from marft_graph import Trainer
from marft_graph.cli import main
from marft_graph.comparison import Price, compare
from marft_graph.errors import ConfigError
from marft_graph.run.comparison_page import write_page
from tests.rollout.test_own_models import Teacher
from tests.test_cli_run import CONFIG, TASK
from tests.training import config

ROWS = [{"q": letter * 3} for letter in "abcdefghij"]


class Scripted(Teacher):
    """Says the question again, and fails on one of them."""

    def _generate(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        if messages[-1].text == "ccc":
            raise ConnectionError("the API is down")
        result = super()._generate(messages, *args, **kwargs)
        result.generations[0].message = AIMessage(
            "yes",
            usage_metadata={"input_tokens": 100, "output_tokens": 20, "total_tokens": 120},
        )
        return result


scripted = Scripted()


class State(TypedDict, total=False):
    q: str
    a: str


def app() -> Any:
    def writer(state: State) -> Any:
        return {"a": scripted.invoke(state["q"]).text}

    return StateGraph(State).add_node("writer", writer).add_edge(START, "writer").compile()


def is_yes(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    return float(state["a"] == "yes")


@pytest.fixture(scope="module")
def export(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    with Trainer(
        app(), train_dataset=ROWS, reward=is_yes, config=config(tiny_model), run_dir=folder / "run"
    ) as trainer:
        return trainer.export(folder / "out")


@pytest.fixture(scope="module")
def found(tiny_model: Path, export: Path) -> Any:
    return compare(
        app(),
        {"api": "own", "base": "base", "trained": export},
        ROWS,
        reward=is_yes,
        config=config(tiny_model, max_new_tokens=4),
        against="base",
        prices={"api": Price(1.0, 10.0)},
    )


def test_the_better_policy_is_called_better(found: Any) -> None:
    assert found.against == "base"
    api = found.differences["api"]
    assert (api.verdict, api.pairs, api.mean) == ("better", 9, 1.0)
    assert found.better[0].policy == "api"
    assert found.better[0].difference == 1.0
    assert found.worse == ()


def test_an_untrained_export_is_the_base_itself(found: Any) -> None:
    same = found.differences["trained"]
    assert (same.mean, same.low, same.high, same.verdict) == (0, 0, 0, "no difference shown")
    base, trained = found.policies[1], found.policies[2]
    assert base.evaluation.returns == trained.evaluation.returns
    assert base.nodes["writer"].completion_tokens == trained.nodes["writer"].completion_tokens


def test_figures_are_those_of_the_policy(found: Any) -> None:
    api, base, _ = found.policies
    assert api.evaluation.episodes_failed == 1
    assert dict(api.evaluation.failed_by_reason) == {"ConnectionError in writer": 1}
    assert api.tokens_per_episode == (100, 20)
    assert api.cost_per_episode == pytest.approx(100e-6 * 1 + 20e-6 * 10)
    assert base.cost_per_episode is None
    assert api.nodes["writer"].calls_per_episode == 1
    assert base.nodes["writer"].completion_tokens <= 6  # the export's limit, not this config's
    assert 0 <= base.nodes["writer"].truncated_share <= 1


def test_a_comparison_is_shown_without_its_episodes(found: Any) -> None:
    assert len(repr(found)) < 400 * len(found.policies) + 400 * len(found.differences)
    assert "messages" not in repr(found)


def test_the_page_and_the_json_hold_it_all(found: Any, tmp_path: Path) -> None:
    values = json.loads(json.dumps(found.to_dict()))
    assert values["differences"]["api"]["verdict"] == "better"
    assert values["better"][0]["after"]["calls"][0]["answer"]["content"] == "yes"
    values["better"][0]["after"]["calls"][0]["answer"]["content"] = "<script>"
    page = write_page(values, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<b>better</b>, 9 examples" in page
    assert "ConnectionError in writer" in page
    assert "<script>" not in page


def test_a_name_that_is_not_compared_is_refused(tiny_model: Path) -> None:
    settings = config(tiny_model)
    for wrong in ({"against": "gpt"}, {"prices": {"gpt": Price(1, 1)}}):
        with pytest.raises(ConfigError, match="'gpt', which is not compared; there are base"):
            compare(app(), {"base": "base"}, ROWS, reward=is_yes, config=settings, **wrong)
    with pytest.raises(ConfigError, match="no policy"):
        compare(app(), {}, ROWS, reward=is_yes, config=settings)


GRAPH = """
from tests.test_comparison import app
graph = app()
"""


@pytest.mark.parametrize("name", ["episodes_per_example", "own_concurrency"])
def test_no_episodes_at_all_are_refused(tiny_model: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0; it must be at least 1"):
        compare(app(), {"a": "own"}, ROWS, reward=is_yes, config=config(tiny_model), **{name: 0})


def test_the_command_prints_and_writes_the_comparison(tiny_model: Path, tmp_path: Path) -> None:
    task = TASK.replace("question", "q").replace('state["answer"]', 'state["a"]')
    settings = CONFIG.replace("base_model: base", f"base_model: {tiny_model}")
    for name, text in {"graph.py": GRAPH, "task.py": task, "config.yaml": settings}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    run = tmp_path / "run"

    def marft(*args: object) -> Any:
        return CliRunner().invoke(main, [str(arg) for arg in args])

    assert marft("train", tmp_path, "--run-dir", run).exit_code == 0
    where = ["--json", tmp_path / "c.json", "--html", tmp_path / "c.html", "--into", run]
    prices = ["--price", "own=0.15,0.60"]
    shown = marft(
        "eval", tmp_path, "--adapters", run / "export", "--own", "--base", *prices, *where
    )
    assert shown.exit_code == 0, shown.output
    assert "base against own: " in shown.stdout
    assert "run against own: " in shown.stdout
    assert json.loads((tmp_path / "c.json").read_text())["against"] == "own"
    assert "Policies side by side" in (tmp_path / "c.html").read_text()
    assert "Policies side by side" in (run / "report.html").read_text()
    for wrong, why in (
        (["--price", "own=cheap"], "is not NAME=READ,WRITTEN"),
        (["--into", tmp_path], "is no run folder"),
        (["--adapters", f"own={run / 'export'}"], "two policies are called 'own'"),
    ):
        refused = marft("eval", tmp_path, "--own", *wrong)
        assert refused.exit_code == 2
        assert why in refused.stderr
