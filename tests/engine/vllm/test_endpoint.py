"""What a vLLM server answers is used only if it is exactly what was asked for."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest

from marft_graph.engine.base import SamplingSettings
from marft_graph.engine.vllm.endpoint import Prompt, completion_body, read_completion

PROMPT = Prompt((1, 2, 3), SamplingSettings(0.7, 4, ("\n",)), 11, (256,), 300)
GOOD = {
    "model": "actor@v3",
    "choices": [
        {
            "finish_reason": "stop",
            "prompt_token_ids": [1, 2, 3],
            "token_ids": [97, 98, 256],
            "logprobs": {"token_logprobs": [-0.5, 0.0, -1.25]},
        }
    ],
}


def choice(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda answer: answer["choices"][0].update(changes)


def top(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda answer: answer.update(changes)


def test_a_good_answer_gives_ids_logprobs_and_reason() -> None:
    answer = read_completion(GOOD, "actor@v3", PROMPT)
    assert answer.ids == (97, 98, 256)
    assert answer.logprobs == (-0.5, 0.0, -1.25)
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (top(model="actor@v2"), "not from 'actor@v2'"),
        (top(model=None), "from model 'actor@v3'"),
        (top(choices="none"), "a completion"),
        (top(choices=[]), "one choice"),
        (top(choices=[None]), "one choice"),
        (top(choices=[{}, {}]), "one choice"),
        (choice(prompt_token_ids=[1, 2, 4]), "the prompt's own token ids"),
        (choice(finish_reason="abort"), "finish_reason stop or length"),
        (choice(finish_reason=None), "finish_reason stop or length"),
        (choice(token_ids=None), "token_ids, 1 to 4"),
        (choice(token_ids=[]), "token_ids, 1 to 4"),
        (choice(token_ids=[97] * 5), "token_ids, 1 to 4"),
        (choice(token_ids=[97, 98, 300]), "token ids below 300"),
        (choice(token_ids=[97, -1, 256]), "token ids below 300"),
        (choice(token_ids=[97, 98.0, 256]), "token ids below 300"),
        (choice(token_ids=[97, True, 256]), "token ids below 300"),
        (choice(logprobs=None), "3 log-probs"),
        (choice(logprobs={"token_logprobs": [-0.5, -0.5]}), "3 log-probs"),
        (choice(logprobs={"token_logprobs": [-0.5, -0.5, None]}), "finite log-probs"),
        (choice(logprobs={"token_logprobs": [-0.5, -0.5, math.nan]}), "finite log-probs"),
        (choice(logprobs={"token_logprobs": [-0.5, -0.5, -math.inf]}), "finite log-probs"),
        (choice(logprobs={"token_logprobs": [-0.5, -0.5, -9999.0]}), "finite log-probs"),
        (choice(logprobs={"token_logprobs": [-0.5, -0.5, 0.5]}), "finite log-probs"),
        (choice(logprobs={"token_logprobs": [-0.5, -0.5, "-1"]}), "finite log-probs"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_refused(
    change: Callable[[dict[str, Any]], None], wanted: str
) -> None:
    answer = copy.deepcopy(GOOD)
    change(answer)
    with pytest.raises(ValueError, match=wanted):
        read_completion(answer, "actor@v3", PROMPT)


@pytest.mark.parametrize("answer", [None, [], "text", 3])
def test_json_that_is_no_object_is_refused(answer: Any) -> None:
    with pytest.raises(ValueError, match="a completion"):
        read_completion(answer, "actor@v3", PROMPT)


def test_the_request_leaves_nothing_to_the_servers_sampling_defaults() -> None:
    body = completion_body("actor@v3", PROMPT)
    assert body["prompt"] == [1, 2, 3]
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0.7, 4, 11)
    assert (body["stop"], body["stop_token_ids"]) == (["\n"], [256])
    neutral = {
        "top_p": 1,
        "top_k": 0,
        "min_p": 0,
        "repetition_penalty": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
    }
    assert {name: body[name] for name in neutral} == neutral
