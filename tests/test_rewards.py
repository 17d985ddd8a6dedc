"""What rewards are built from: combined functions, limits, a reward model, forms and maths."""

import asyncio
import concurrent.futures
import functools
import gc
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import HumanMessage
from langgraph.graph import START, StateGraph
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification
from typing_extensions import TypedDict

from marft_graph import Reward, TrainConfig, Trainer, rewards
from marft_graph.engine.fake import FakeEngine
from marft_graph.errors import ConfigError, ModelError, RewardError
from marft_graph.rewards import (
    RewardModel,
    combine,
    json_valid,
    length_penalty,
    matches,
    math_equal,
    maths,
)
from marft_graph.rollout.runner import run_episodes
from marft_graph.run.tracking import read_metrics
from tests.apps import duo


class State(TypedDict):
    q: str
    a: str


model = FakeListChatModel(responses=["own"])


def app():
    builder = StateGraph(State)
    builder.add_node("actor", lambda state: {"a": model.invoke(state["q"]).text})
    builder.add_edge(START, "actor")
    return builder.compile()


@pytest.fixture
def engine():
    made = FakeEngine(lambda agent, messages: messages[-1].text * 2)
    yield made
    made.close()


def play(engine, reward, count=1, **settings):
    examples = [{"q": str(number), "number": number} for number in range(count)]
    return run_episodes(app(), examples, engine=engine, reward=reward, **settings)


def number(example, state):
    return example["number"]


async def length(example, state):
    await asyncio.sleep(0)
    return {"actor": len(state["a"])}


def both(example, state):
    return Reward(outcome=1.0, nodes={"actor": 2.0})


def test_every_name_of_the_module_exists():
    assert [name for name in rewards.__all__ if not hasattr(rewards, name)] == []


# Combined rewards


@pytest.mark.parametrize(
    "given_as",
    [
        combine((number, 2.0), (length, 0.5), both),
        [(number, 2.0), (length, 0.5), both],
        {number: 2.0, length: 0.5, both: 1.0},
    ],
    ids=["combine", "sequence", "mapping"],
)
def test_parts_of_every_kind_add_up_with_their_weights(engine, given_as):
    episode = play(engine, given_as, 4)[3]
    assert episode.outcome_reward == 2.0 * 3 + 1.0
    assert episode.node_rewards == {"actor": 0.5 * 2 + 2.0}
    assert episode.calls[-1].reward == 3.0
    assert episode.total_reward == 10.0
    assert episode.reward_parts == {"number": 3.0, "length": 2.0, "both": 3.0}


def test_a_combined_reward_is_a_reward_function_by_itself():
    nested = combine((combine((number, 2.0)), 3.0), lambda example, state: 0.5)
    reward = asyncio.run(nested({"number": 2}, {}))
    assert reward.outcome == 12.5
    assert reward.parts == {"number": 2.0, "CombinedReward": 4.0, "lambda": 0.5}


def test_parts_of_one_name_are_told_apart():
    def number_2(example, state):
        return 0

    twice = functools.partial(number)
    assert [p.name for p in combine(number, number_2, twice, number).parts] == [
        "number",
        "number_2",
        "number_3",
        "number_4",
    ]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "at least one"),
        ([3.0], r"3\.0 is no reward"),
        ([("number", 1.0)], "is no reward"),
        ([(number, float("nan"))], "weight of 'number' is nan"),
        ({number: "1"}, "weight of 'number' is '1'"),
        (0.5, r"reward is 0\.5; it must be a function"),
    ],
)
def test_what_is_no_reward_is_refused_before_anything_runs(engine, bad, message):
    with pytest.raises(ConfigError, match=message):
        play(engine, bad)
    assert engine.requests == []


def test_a_part_that_fails_is_named_with_the_example(engine):
    def broken(example, state):
        raise KeyError("gold")

    with pytest.raises(RewardError, match=r"'broken' raised KeyError: 'gold', on example.*'q'"):
        play(engine, [number, broken])
    with pytest.raises(RewardError, match=r"'<lambda>|'lambda' returned 'x' for the outcome"):
        play(engine, [number, lambda example, state: "x"])


# Limits


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_no_more_rewards_are_computed_at_once_than_asked(engine, kind):
    running, peak, lock = [], [], threading.Lock()

    def begin():
        with lock:
            running.append(1)
            peak.append(len(running))

    def sync(example, state):
        begin()
        time.sleep(0.01)
        running.pop()
        return 1.0

    async def slow(example, state):
        begin()
        await asyncio.sleep(0.01)
        running.pop()
        return 1.0

    part = sync if kind == "sync" else slow
    episodes = play(engine, [part, part], 10, reward_concurrency=3)
    assert all(episode.outcome_reward == 2.0 for episode in episodes)
    assert len(peak) == 20
    assert max(peak) == 3


def test_an_async_reward_is_not_called_for_an_episode_cancelled_before():
    """A coroutine that was made and never started is reported by Python wherever it is found."""
    from marft_graph.rollout.rewards import RewardCalls

    asked = []

    async def reward(example, state):
        asked.append(example)
        return 1.0

    async def cancelled_at_once():
        with ThreadPoolExecutor(1) as threads:
            calls = RewardCalls(threads, timeout=5, concurrency=1)
            running = asyncio.ensure_future(calls._result(reward, {}, {}))
            await asyncio.sleep(0)  # its inner task exists now, and has not begun
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()  # all at once, as when a run is stopped
            with pytest.raises(asyncio.CancelledError):
                await running

    asyncio.run(cancelled_at_once())
    gc.collect()
    assert asked == []


def test_waiting_for_a_place_is_not_counted_as_taking_long(engine):
    def slow(example, state):
        time.sleep(0.1)
        return 1.0

    episodes = play(engine, slow, 16, reward_concurrency=1, reward_timeout=1.2)
    assert sum(episode.outcome_reward for episode in episodes) == 16


def test_a_reward_that_hangs_leaves_its_place_to_the_next_one(engine):
    released = threading.Event()

    def reward(example, state):
        if not entered:
            entered.append(True)
            released.wait(30)
        return 1.0

    entered = []
    settings = {"reward_concurrency": 1, "reward_timeout": 0.2, "reward_errors": "drop"}
    episodes = play(engine, reward, 3, **settings)
    released.set()
    assert sorted(episode.ok for episode in episodes) == [False, True, True]


def test_a_sync_function_that_returns_an_awaitable_has_one_deadline(engine):
    with pytest.raises(RewardError, match=r"longer than 0\.1 seconds"):
        play(engine, lambda example, state: asyncio.sleep(30), reward_timeout=0.1)
    (episode,) = play(engine, lambda example, state: length(example, state))
    assert episode.node_rewards == {"actor": 2.0}


# In training


def test_the_means_of_the_parts_are_in_the_metrics(tiny_model, tmp_path):
    def correct(example, state):
        return float(example["answer"] == "1")

    def penalty(example, state):
        return length_penalty(state["answer"], limit=0, buffer=0, unit="characters")

    config = TrainConfig(
        base_model=str(tiny_model),
        iterations=1,
        examples_per_iteration=2,
        group_size=2,
        max_new_tokens=4,
        advantage="group",
        device="cpu",
        reward_concurrency=2,
    )
    examples = [{"question": "q", "answer": str(number)} for number in range(2)]
    with Trainer(
        duo(),
        train_dataset=examples,
        reward={correct: 1.0, penalty: 0.5},
        config=config,
        run_dir=tmp_path / "run",
    ) as trainer:
        trainer.train(progress=False)
    (row,) = read_metrics(tmp_path / "run")
    assert row["rewards"]["correct"] == 0.5  # one of the two examples
    assert -1.0 <= row["rewards"]["penalty"] <= 0.0
    assert row["return_mean"] == pytest.approx(0.5 + 0.5 * row["rewards"]["penalty"])


def test_a_reward_that_is_none_is_refused_by_the_trainer(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="it must be a function"):
        Trainer(
            duo(),
            train_dataset=[{"question": "q"}],
            reward="correct",
            config={"base_model": str(tiny_model)},
            run_dir=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


# Reward model


@pytest.fixture(scope="module")
def scorer(tiny_model, tmp_path_factory):
    """Saves a random scorer with the tiny model's tokenizer; returns its folder."""

    def save(labels=1, pad=True, context=64):
        folder = tmp_path_factory.mktemp("scorer")
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        if not pad:
            tokenizer.pad_token = tokenizer.eos_token
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=context,
            initializer_range=0.2,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            num_labels=labels,
        )
        Qwen2ForSequenceClassification(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


TEXTS = ["a", "a longer text", "", "b", "something else", "one more", "cc"]


def alone(folder, text):
    """The score of one text, from transformers itself."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    classifier = Qwen2ForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return float(classifier(**tokenizer(text, return_tensors="pt")).logits[0, 0])


@pytest.mark.parametrize("pad", [True, False], ids=["pad token", "no pad token"])
def test_a_reward_model_gives_each_text_the_score_it_has_alone(scorer, pad):
    folder = scorer(pad=pad)
    texts = [text + "!" for text in TEXTS] + ["ends with its end<|end|>"]
    scores = RewardModel(folder, lambda e, s: "", device="cpu").score(texts)
    expected = [alone(folder, text) for text in texts]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 3) for score in scores}) > 4


def test_a_reward_model_batches_what_concurrent_episodes_ask(engine, scorer, monkeypatch):
    monkeypatch.setattr("marft_graph.rewards.model._GATHER_SECONDS", 0.2)
    folder = scorer()
    reward = RewardModel(folder, lambda example, state: state["a"], device="cpu", batch_size=8)
    episodes = play(engine, reward, 24)
    for episode in episodes:
        assert episode.outcome_reward == pytest.approx(alone(folder, episode.state["a"]), abs=1e-5)
    assert 3 <= reward.batches <= 12


def test_a_text_that_a_reward_model_cannot_score_takes_no_other_along(scorer, monkeypatch):
    reward = RewardModel(scorer(), lambda e, s: s, device="cpu")
    forward = reward._forward

    def failing(rows):
        if any(len(row) == 3 for row in rows):
            raise IndexError("index out of range")
        return forward(rows)

    expected = reward.score(["a", "bb", "dddd"])
    monkeypatch.setattr(reward, "_forward", failing)
    futures = [reward._submit(text) for text in ("a", "bb", "ccc", "dddd")]
    assert isinstance(futures.pop(2).exception(20), IndexError)
    assert [future.result(20) for future in futures] == pytest.approx(expected, abs=1e-5)


def test_a_reward_model_reads_messages_through_the_chat_template(scorer):
    reward = RewardModel(scorer(), lambda e, s: s, device="cpu")
    templated, messages, dicts = reward.score(
        ["<|user|>hi<|end|>", [HumanMessage("hi")], [{"role": "user", "content": "hi"}]]
    )
    assert templated == pytest.approx(messages, abs=1e-6)
    assert templated == pytest.approx(dicts, abs=1e-6)


def test_a_text_that_is_too_long_or_empty_is_refused(engine, scorer):
    reward = RewardModel(scorer(), lambda example, state: "x" * 65, device="cpu")
    with pytest.raises(RewardError, match=r"text of 65 tokens; it takes 1 to 64"):
        play(engine, reward)
    with pytest.raises(RewardError, match="text of 0 tokens"):
        reward.score([""])


def test_a_classifier_with_several_labels_is_no_reward_model(scorer):
    with pytest.raises(ModelError, match=r"has 3 labels; a reward model has one"):
        RewardModel(scorer(labels=3), lambda e, s: "")


def test_a_model_without_a_trained_score_is_no_reward_model(tiny_model, tmp_path):
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = {"0": "score"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"score\.weight.*never trained to score"):
        RewardModel(tmp_path, lambda e, s: "")


def test_a_reward_model_that_does_not_exist_is_named():
    with pytest.raises(ModelError, match=r"'no/such-model' cannot be loaded"):
        RewardModel("no/such-model", lambda e, s: "")


def test_a_reward_model_in_pickled_weights_is_refused(scorer):
    folder = scorer()
    weights = Qwen2ForSequenceClassification.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        RewardModel(folder, lambda e, s: "")


# Length and form


@given(st.integers(0, 60), st.integers(0, 40), st.integers(0, 40))
def test_the_length_penalty_falls_from_0_to_minus_1_over_the_buffer(length, limit, buffer):
    if buffer > limit:
        with pytest.raises(ConfigError, match="buffer"):
            length_penalty("x", limit=limit, buffer=buffer)
        return
    text = "x" * length
    penalty = length_penalty(text, limit=limit, buffer=buffer, unit="characters")
    assert penalty == length_penalty(" ".join(text), limit=limit, buffer=buffer)  # as words
    assert -1.0 <= penalty <= 0.0
    assert penalty >= length_penalty(text + "x", limit=limit, buffer=buffer, unit="characters")
    assert (penalty == 0.0) == (length <= limit - buffer)
    assert (penalty == -1.0) == (length > limit or (length == limit and buffer > 0))


def test_a_form_covers_the_whole_text():
    assert matches("  12\n", r"\d+")
    assert not matches("12 figs", r"\d+")


def test_deep_or_broken_json_is_not_valid():
    assert not json_valid("[" * 100_000)
    assert not json_valid('{"a": 1')
    assert json_valid('"text"')
    assert not json_valid('"text"', keys=["text"])


# Mathematics

pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("0.5", "1/2"),
        (r"\frac{2}{4}", "0.5"),
        ("so it is $x = 3$", "3"),
        (r"I get 4, no, \boxed{7}", "7"),
        ("3,000", 3000),
        ("x^2-1", "(x-1)(x+1)"),
        (r"\sqrt{8}", r"2\sqrt{2}"),
        ("(1, 2)", "(1,2)"),
        ("12 apples", "12"),
    ],
)
def test_answers_that_say_the_same_are_equal(answer, expected):
    assert math_equal(answer, expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("2*x", "2"),
        (r"\frac{1}{2}", "2"),
        ("", "0"),
        ("I do not know", "12"),
        ("x+1", "x-1"),
        ("(" * 3000, "1"),
    ],
)
def test_answers_that_say_something_else_are_not(answer, expected):
    assert not math_equal(answer, expected)


def test_an_answer_that_nobody_can_work_out_is_not_equal_and_holds_nothing_up():
    started = time.monotonic()
    assert not math_equal("$9^{9^{9^{9}}}$", "3", timeout=0.5)
    assert math_equal("$3$", "3")
    assert time.monotonic() - started < 60


def test_plain_decimals_are_compared_without_a_process_and_as_math_verify_does(monkeypatch):
    texts = ["18", "18.0", "-18", "+18", ".5", "0.50", "5.", "0", "-0", "007", "1234.5", "0.3333"]
    said = {(a, b): maths._compare(a, b) == "equal" for a in texts for b in texts}
    monkeypatch.setattr(maths, "_pool", None)
    assert {(a, b): math_equal(a, b) for a in texts for b in texts} == said


def test_an_expectation_without_mathematics_is_an_error():
    with pytest.raises(RewardError, match="no idea at all"):
        math_equal("3", "no idea at all")


def test_maths_is_compared_from_many_threads(engine):
    def correct(example, state):
        return math_equal(f"${state['a']}$", example["number"] * 11)

    episodes = play(engine, correct, 10)  # the engine says every digit twice
    assert [episode.outcome_reward for episode in episodes] == [1.0] * 10


def test_without_math_verify_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(maths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'marft-graph\[math\]'"):
        math_equal("1", "1")


def ends_its_iterator(example: object, state: object) -> float:
    return next(iter(()))


def cancelled_in_a_thread(example: object, state: object) -> float:
    raise concurrent.futures.CancelledError


async def waits_for_a_cancelled_task(example: object, state: object) -> float:
    task = asyncio.create_task(asyncio.sleep(9, 1.0))
    task.cancel()
    return await task


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (ends_its_iterator, "StopIteration"),
        (cancelled_in_a_thread, "CancelledError"),
        (waits_for_a_cancelled_task, "CancelledError"),
        ([waits_for_a_cancelled_task, lambda example, state: 1.0], "CancelledError"),
    ],
)
def test_what_asyncio_takes_for_an_end_is_a_reward_that_raised(function: Any, name: str) -> None:
    engine = FakeEngine("x")
    examples = [{"question": "q"}]
    try:
        with pytest.raises(RewardError, match=rf"raised .*{name}.*on example .*'q'"):
            run_episodes(duo(), examples, engine=engine, reward=function, reward_timeout=10)
        (dropped,) = run_episodes(
            duo(), examples, engine=engine, reward=function, reward_errors="drop"
        )
    finally:
        engine.close()
    assert not dropped.ok
    assert name in dropped.error
