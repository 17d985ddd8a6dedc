"""Imitation: the loss is that of the answer's tokens, and only the demonstrated adapter changes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

from marft_graph import Trainer
from marft_graph.demonstrations import Demonstration, read_demonstrations
from marft_graph.errors import ConfigError, DatasetError
from marft_graph.learn.supervised import as_call, imitate
from marft_graph.policy.adapters import Policy
from marft_graph.policy.team import Team
from marft_graph.workflow import Workflow, load_target
from tests.support import make_agents
from workflows.math_duo.graph import ACTOR_PROMPT, REASONER_PROMPT
from workflows.math_duo.task import calculations, story

AGENTS = ("planner", "actor")


def demonstration(question: str, answer: str, node: str = "actor", **more: Any) -> Demonstration:
    prompt = (SystemMessage("Answer."), HumanMessage(question))
    return Demonstration(node, prompt, AIMessage(answer), **more)


@pytest.fixture
def team(tiny_model: Path) -> Team:
    return Team([Policy.load(str(tiny_model), make_agents(AGENTS, tiny_model))], AGENTS)


def adapters() -> dict[str, str]:
    return {name: name for name in AGENTS}


def test_the_loss_is_the_cross_entropy_of_the_answer_alone(team: Team) -> None:
    policy = team.of("actor")
    rows = [demonstration("7 and 5?", "twelve"), demonstration("1?", "1")]
    losses, tokens = 0.0, 0
    for question, answer in (("7 and 5?", "twelve"), ("1?", "1")):
        prompt = f"<|system|>Answer.<|end|><|user|>{question}<|end|><|assistant|>"
        ids = policy.tokenizer(prompt + answer + "<|end|>", return_tensors="pt").input_ids
        labels = ids.clone()
        labels[:, : len(policy.tokenizer(prompt).input_ids)] = -100
        with torch.no_grad(), policy.using(None):
            loss = policy.model(input_ids=ids, labels=labels).loss
        losses += float(loss) * (len(answer) + 1)
        tokens += len(answer) + 1
    stats = imitate(team, rows, adapters(), epochs=1, batch_size=2)["actor"]
    assert stats["loss_first"] == pytest.approx(losses / tokens, abs=1e-5)
    assert (stats["demonstrations"], stats["tokens"]) == (2, tokens)


def test_micro_batches_make_no_difference(tiny_model: Path) -> None:
    rows = [demonstration("q" * n, "a" * (1 + n % 4)) for n in range(1, 9)]
    results = []
    for size in (10_000, 30):
        policy = Policy.load(str(tiny_model), make_agents(AGENTS, tiny_model))
        own = Team([policy], AGENTS)
        imitate(own, rows, adapters(), epochs=2, batch_size=4, microbatch_tokens=size)
        results.append([p.detach().clone() for p in own.parameters("actor")])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3)


def test_other_adapters_and_the_base_stay_bit_identical(team: Team) -> None:
    policy = team.of("actor")
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    imitate(team, [demonstration("7?", "x")], adapters(), learning_rate=1e-2)
    changed = {
        name
        for name, parameter in policy.model.named_parameters()
        if not torch.equal(before[name], parameter)
    }
    assert changed
    assert all("node-actor" in name for name in changed)


def test_shared_adapters_learn_from_all_their_nodes(team: Team) -> None:
    rows = [demonstration("a", "b", node="planner"), demonstration("c", "d")]
    stats = imitate(team, rows, {"planner": "actor", "actor": "actor"}, epochs=1)
    assert list(stats) == ["actor"]
    assert stats["actor"]["demonstrations"] == 2


def test_ids_that_were_sampled_are_learnt_as_they_are(team: Team) -> None:
    policy = team.of("actor")
    # Bytes are this tokenizer's tokens; an end token is what sampling has in addition.
    prompt = policy.codec.render([HumanMessage("hello")])
    ids = (*policy.tokenizer.encode("ok"), policy.tokenizer.eos_token_id)
    sampled = demonstration("another prompt", "ok", prompt_ids=prompt, completion_ids=ids)
    call = as_call(sampled, "actor", policy)
    assert call is not None
    assert (call.prompt_ids, call.completion_ids) == (prompt, ids)
    foreign = demonstration("q", "no", prompt_ids=prompt, completion_ids=ids)
    for other in (foreign, demonstration("q", "no", prompt_ids=(10**6,), completion_ids=ids)):
        rendered = as_call(other, "actor", policy)
        assert rendered is not None
        assert rendered.prompt_ids != other.prompt_ids
        assert policy.codec.decode(rendered.completion_ids) == "no"


def test_what_does_not_fit_the_context_is_counted(team: Team) -> None:
    long = demonstration("x" * 300, "y")  # the context is 256
    stats = imitate(team, [long, demonstration("x", "y")], adapters(), epochs=1)
    assert stats["actor"]["too_long"] == 1
    with pytest.raises(DatasetError, match="none of its 1 demonstrations fits"):
        imitate(team, [long], adapters())


def test_demonstrations_of_other_nodes_are_refused_or_logged(
    team: Team, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = demonstration("x", "y", node="editor")
    with pytest.raises(DatasetError, match="are of editor; trained are planner, actor"):
        imitate(team, [stranger], adapters())
    imitate(team, [stranger, demonstration("x", "y")], adapters(), epochs=1)
    assert "1 demonstrations of 'editor' are left out" in caplog.text


def test_a_warm_started_team_does_what_its_teacher_does(tmp_path: Path) -> None:
    """The tiny base spells results and misreads its partner; the teacher does neither."""
    duo, rng = math_duo(), random.Random(0)
    assert duo.load_data is not None
    rows, problems = [], []
    for a, operation, b in rng.sample(calculations(), 96):
        question, plan = story(a, operation, b, rng), f"{a}{operation}{b}"
        answer = str(a + b if operation == "+" else a - b)
        problems.append({"question": question, "answer": answer})
        for node, prompt, text, reply in (
            ("reasoner", REASONER_PROMPT, question, plan),
            ("actor", ACTOR_PROMPT, f"{question}\n{plan}", answer),
        ):
            asked = [{"role": "system", "content": prompt}, {"role": "user", "content": text}]
            rows.append({"node": node, "messages": [*asked, said(reply)]})
    settings = {k: v for k, v in duo.settings.items() if k != "dataset"} | {"device": "cpu"}
    with Trainer(
        duo.graph,
        train_dataset=problems,
        eval_dataset=duo.load_data()[1].select(range(64)),
        reward=duo.reward,
        config=settings,
        run_dir=tmp_path / "run",
    ) as trainer:
        before = trainer.evaluate(greedy=True)
        stats = trainer.warm_start(rows, epochs=3, batch_size=16)
        after = trainer.evaluate(greedy=True)
    assert before.return_mean < 0.1
    assert after.return_mean > 0.4  # on stories that the teacher never saw
    assert stats["actor"]["loss_last"] < 0.8 * stats["actor"]["loss_first"]


def math_duo() -> Workflow:
    return load_target(str(Path(__file__).parents[2] / "workflows" / "math_duo"))


def planner_prompt(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Plan."}, {"role": "user", "content": question}]


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_the_best_episodes_of_a_run_are_its_teacher(tmp_path: Path) -> None:
    duo = math_duo()
    assert duo.load_data is not None
    assert duo.reward is not None
    settings = {k: v for k, v in duo.settings.items() if k != "dataset"}
    settings |= {"iterations": 1, "examples_per_iteration": 16, "device": "cpu"}
    given = {"train_dataset": duo.load_data()[0], "reward": duo.reward, "config": settings}
    with Trainer(duo.graph, run_dir=tmp_path / "first", **given) as first:
        first.train(progress=False)
    kept = read_demonstrations(tmp_path / "first", best=1)
    assert 0 < len(kept) < len(read_demonstrations(tmp_path / "first"))
    assert all(one.completion_ids for one in kept)
    with Trainer(duo.graph, run_dir=tmp_path / "second", **given) as second:
        stats = second.warm_start(tmp_path / "first", best=1, epochs=4, batch_size=4)
        assert sum(own["demonstrations"] for own in stats.values()) == len(kept)
        assert all(own["loss_last"] < own["loss_first"] for own in stats.values())
        second.train(progress=False)
        with pytest.raises(ConfigError, match="warm_start comes before training"):
            second.warm_start(tmp_path / "first")


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0.0}])
def test_numbers_out_of_range_are_refused(make: Any, wrong: dict[str, Any]) -> None:
    rows = [{"node": "actor", "messages": [*planner_prompt("q"), said("a")]}]
    trainer: Trainer
    with make() as trainer, pytest.raises(ConfigError, match=next(iter(wrong))):
        trainer.warm_start(rows, **wrong)
