"""What the reward compares with is kept from the agents, whatever the channels are called."""

from __future__ import annotations

import functools
import logging
import operator
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from click.testing import CliRunner
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableLambda
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from pydantic import BaseModel

from marft_graph import Episode, FakeEngine, Trainer, compile_graph, run_episodes
from marft_graph.cli import main
from marft_graph.errors import DatasetError, RewardError
from marft_graph.rewards import combine
from marft_graph.rollout import labels
from marft_graph.rollout.labels import labels_of
from marft_graph.workflow import load_target
from tests import training
from tests.support import save_random_model

model = ChatOpenAI(model="gpt-4o-mini", api_key="not-set")
EXAMPLE = {"question": "6*7?", "answer": "42"}
WORKFLOWS = sorted((Path(__file__).parents[2] / "workflows").glob("*/task.py"))


class State(TypedDict, total=False):
    question: str
    answer: str
    notes: Annotated[list[str], operator.add]


class Question(TypedDict):
    question: str


class QuestionAndAnswer(Question):
    answer: str


def solver(state: State) -> State:
    """Shows the model all that it was given."""
    return {"answer": model.invoke([HumanMessage(repr(sorted(state.items())))]).text}


def strict_solver(state: State) -> State:
    return {"answer": model.invoke([HumanMessage(state["answer"])]).text}


def in_place(state: State) -> State:
    state["answer"] = model.invoke([HumanMessage(repr(sorted(state.items())))]).text
    return state


def silent(state: State) -> State:
    model.invoke([HumanMessage("hm")])
    return {"answer": "no"} if state["question"] == "?" else {}


def reward(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    return float(state["answer"] == example["answer"])


def of_question(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    return float(len(state) > len(example["question"]))


def app(node: Callable[[State], State] = solver, **schemas: Any) -> Any:
    builder = StateGraph(State, **schemas)
    builder.add_node("solver", node)
    builder.add_edge(START, "solver")
    builder.add_edge("solver", END)
    return builder.compile()


def run(graph: Any, function: Any = reward, **options: Any) -> Episode:
    engine = FakeEngine({"solver": "41"})
    try:
        return run_episodes(graph, [EXAMPLE], engine=engine, reward=function, **options)[0]
    finally:
        engine.close()


def shown(episode: Episode) -> str:
    assert episode.ok, episode.error
    return str(episode.calls[0].messages[0]["content"])


def test_a_label_named_like_the_agents_own_answer_is_not_shown_to_it() -> None:
    assert shown(run(app())) == "[('notes', []), ('question', '6*7?')]"


def test_an_app_without_an_answer_is_not_paid_for_the_label() -> None:
    with pytest.raises(RewardError, match=r"KeyError: 'answer'.*'answer' was withheld .*schema"):
        run(app(silent))


def test_a_node_that_fails_without_the_label_is_told_the_ways_out() -> None:
    builder = StateGraph(State)
    builder.add_node("solver", lambda state: strict_solver(*[state]))
    builder.add_node("writer", lambda state: {"answer": "1"})
    builder.add_edge(START, "solver")
    builder.add_edge("solver", "writer")
    episode = run(builder.compile())
    assert not episode.ok
    assert "KeyError" in episode.error
    assert "the example's 'answer' was withheld from the graph" in episode.error
    assert "`inputs=`" in episode.error


def test_a_node_that_reads_the_key_before_any_node_writes_it_asks_for_inputs() -> None:
    text = r"'answer'\. The reward names it and node 'solver' writes it.* 'solver' reads it before"
    with pytest.raises(DatasetError, match=text):
        run(app(strict_solver))
    with pytest.raises(DatasetError, match="`inputs=`"):
        run(app(reviser))
    assert shown(run(app(strict_solver), inputs=["question", "answer"])) == "42"
    assert "42" in shown(run(app(reviser), inputs=["answer"]))


def reviser(state: State) -> State:
    draft = state.get("answer", "")
    return {"answer": model.invoke([HumanMessage(f"Revise: {draft}")]).text}


def test_a_node_that_reads_what_another_has_written_needs_no_example() -> None:
    builder = StateGraph(State)
    builder.add_node("drafter", solver)
    builder.add_node("reviser", reviser)
    builder.add_edge(START, "drafter")
    builder.add_edge("drafter", "reviser")
    found = labels_of(builder.compile(), reward)
    assert found.withheld == {"answer"}
    assert not found.readers


def test_a_branch_beside_the_writer_reads_before_it() -> None:
    builder = StateGraph(State)
    builder.add_node("writer", lambda state: {"answer": "1"})
    builder.add_node("reader", reader)
    builder.add_edge(START, "writer")
    builder.add_edge(START, "reader")
    builder.add_edge("writer", "reader")
    assert labels_of(builder.compile(), reward).readers == {"answer": "reader"}


def reader(state: State) -> State:
    return {"notes": [state["answer"]]}


def test_what_is_withheld_is_said_once_with_the_reason(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels, "_said", set())
    with caplog.at_level(logging.WARNING, "marft_graph"):
        for _ in range(2):
            run(app())
    assert [r.message for r in caplog.records if "not given to the graph" in r.message] == [
        "the examples' 'answer' is for the reward alone and not given to the graph: the reward "
        "names it and node 'solver' writes it. If the app needs it, say what the graph is given by "
        "`inputs=` (a list of keys, or a function from example to input), or compile it with an "
        "input_schema"
    ]


def test_the_trainer_says_it_once_and_its_graph_and_report_keep_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "marft_graph"):
        trainer = Trainer(
            app(),
            train_dataset=[EXAMPLE],
            reward=reward,
            config=training.config(save_random_model(tmp_path / "model"), iterations=1),
            run_dir=tmp_path / "run",
        )
    assert sum("not given to the graph" in record.message for record in caplog.records) == 1
    with trainer:
        result = trainer.train(progress=False)
    assert "is for the reward alone and not given to the graph" in result.report.read_text()
    assert "not given to the graph" in (tmp_path / "run" / "graph.json").read_text()


def test_inspect_says_what_is_withheld_from_a_workflow(tmp_path: Path) -> None:
    (tmp_path / "graph.py").write_text("from tests.rollout.test_labels import app\ngraph = app()\n")
    (tmp_path / "task.py").write_text("from tests.rollout.test_labels import reward\n")
    output = CliRunner().invoke(main, ["inspect", str(tmp_path)]).output
    assert "note: the examples' 'answer' is for the reward alone" in output
    (tmp_path / "task.py").write_text(
        "from tests.rollout.test_labels import reward\ninputs = ['question', 'answer']\n"
    )
    assert "for the reward alone" not in CliRunner().invoke(main, ["inspect", str(tmp_path)]).output


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("question", "a list of the example's keys"),
        ([], "a list of the example's keys"),
        ([1], "a list of the example's keys"),
        (["qestion"], "names 'qestion'; the graph's input has 'answer', 'notes', 'question'"),
        (["question", "notes"], "KeyError: 'notes', on example"),
    ],
)
def test_a_list_of_keys_is_checked(inputs: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        run(app(), inputs=inputs)


def test_a_list_of_keys_hands_over_exactly_those() -> None:
    assert shown(run(app(), inputs=["question"])) == "[('notes', []), ('question', '6*7?')]"
    assert "'42'" in shown(run(app(), inputs=("question", "answer")))
    assert compile_graph(app(), [EXAMPLE], ["question"]).agents == ("solver",)


def test_an_input_schema_that_names_the_key_is_deliberate() -> None:
    assert "'42'" in shown(run(app(input_schema=QuestionAndAnswer)))
    assert "'42'" not in shown(run(app(input_schema=Question)))


def test_an_input_function_is_deliberate() -> None:
    assert "'42'" in shown(run(app(), inputs=dict))


def test_what_the_reward_does_not_name_is_an_input() -> None:
    assert "'42'" in shown(run(app(), of_question))
    assert "'42'" in shown(run(app(), None))


def of_the_state(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    return float(len(state["answer"]) + len(state.get("answer", "")))


def of_both(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    wanted = example.get("answer")
    return float(state["answer"] == wanted)


def test_what_the_reward_names_as_a_key_of_the_state_alone_is_an_input() -> None:
    """As in an app that begins with a text and rewrites it."""
    assert "'42'" in shown(run(app(), of_the_state))
    assert "'42'" in shown(run(app(), lambda example, state: of_length(state["answer"])))
    assert "'42'" not in shown(run(app(), of_both))


def of_length(answer: str) -> float:
    return float(len(answer))


class Judge:
    """A reward that is an object, and reads by way of another function."""

    def __init__(self, right: Callable[..., float]) -> None:
        self._right = right

    def __call__(self, example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        return self._right(example, state)


def weighted(weight: float, example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    return weight * reward(example, state)


def by_module(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    return training.reward(example, state)


LABEL = "answer"


def by_constant(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    return float(state[LABEL] == example[LABEL])


def by_loop(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    return sum(float(state[key] == example[key]) for key in ("answer", "notes"))


@pytest.mark.parametrize(
    "function",
    [
        by_constant,
        by_loop,
        Judge(reward),
        functools.partial(weighted, 0.5),
        combine(of_question, (reward, 0.5)),
        by_module,
        max,
    ],
    ids=["constant", "loop", "object", "partial", "combined", "module", "no code to read"],
)
def test_the_reward_may_be_written_in_any_way(function: Any) -> None:
    assert labels_of(app(), function).withheld == {"answer"}


def test_a_subgraph_writes_for_the_node_that_it_is() -> None:
    builder = StateGraph(State)
    builder.add_node("team", app())
    builder.add_edge(START, "team")
    assert labels_of(builder.compile(), reward).withheld == {"answer"}


def test_messages_and_other_channels_that_collect_are_inputs() -> None:
    def noting(state: State) -> State:
        return {"notes": ["a"], "answer": "1"}

    def counts(example: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        return len(state["notes"]) - len(example["notes"])

    assert labels_of(app(noting), counts).withheld == set()


def test_a_node_that_may_write_anything_brings_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = save_random_model(tmp_path / "model")
    for graph, said in ((app(in_place), True), (app(RunnableLambda(solver)), False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "marft_graph"):
            Trainer(
                graph,
                train_dataset=[EXAMPLE],
                reward=reward,
                config=training.config(base),
                run_dir=tmp_path / f"run_{said}",
            ).close()
        warned = [r.message for r in caplog.records if "agents can read it" in r.message]
        assert len(warned) == said
        assert all("'answer'" in text and "`inputs=`" in text for text in warned)


def test_a_graph_whose_only_input_is_the_label_is_refused() -> None:
    builder = StateGraph(TypedDict("Only", {"answer": str}))
    builder.add_node("solver", lambda state: {"answer": model.invoke("hm").text})
    builder.add_edge(START, "solver")
    with pytest.raises(DatasetError, match="'answer' only, which the reward names"):
        run(builder.compile())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.parent.name)
def test_our_workflows_leave_no_doubt(path: Path) -> None:
    workflow = load_target(str(path.parent))
    found = labels_of(workflow.graph, workflow.reward)
    if workflow.inputs is None:
        assert not found.doubtful
        assert not found.readers
        assert "question" not in found.withheld


def judge(prediction: str, answer: str, **_: Any) -> float:
    return float(prediction == answer)


class Sum(BaseModel):
    question: str
    answer: str


class Keys:
    gold = "answer"


gold_of = operator.itemgetter("answer")


def under_a_default(example: Mapping[str, Any], state: Any, *, key: str = "answer") -> float:
    return float(example[key] == state[key])


@pytest.mark.parametrize(
    "function",
    [
        lambda example, state: judge(state["answer"], **example),
        lambda example, state: types.SimpleNamespace(**example).answer == state["answer"],
        lambda example, state: Sum.model_validate(example).answer == state["answer"],
        lambda example, state: gold_of(example) == gold_of(state),
        lambda example, state: example[Keys.gold] == state[Keys.gold],
        under_a_default,
    ],
)
def test_a_label_that_the_reward_reads_by_another_way_is_withheld(function: Any) -> None:
    assert labels_of(app(), function).withheld == {"answer"}


@pytest.mark.parametrize(
    "function",
    [
        lambda example, state: example == state,
        lambda example, state: any(v == state.get(k) for k, v in example.items()),
        lambda example, state: example[f"{'ans'}wer"] == state["answer"],
        lambda example, state: sorted(example)[0] in state,
    ],
)
def test_a_reward_that_may_read_any_key_is_told_of(
    function: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels, "_said", set())
    assert "42" in shown(run(app(), function))
    assert "the reward's code does not show which keys" in caplog.text
    assert "'answer', and node 'solver' writes it" in caplog.text
    assert "`inputs=`" in caplog.text


@pytest.mark.parametrize(
    "function",
    [
        of_question,
        lambda example, state: len(example.get("question", "")) + len(state["answer"]),
        lambda example, state: "question" in example and len(state["answer"]),
        functools.partial(lambda word, example, state: word in example["question"], "six"),
    ],
)
def test_a_reward_that_reads_other_keys_has_no_label(function: Any) -> None:
    assert labels_of(app(), function).told(EXAMPLE) == []
