from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from marft_graph.agents import agents_of
from marft_graph.config import TrainConfig
from marft_graph.policy import logprobs
from marft_graph.policy.adapters import Policy
from marft_graph.policy.lora import BASE

# Adapters of different ranks, scales and targets.
PER_NODE = {
    "a": {"lora_rank": 4},
    "b": {"lora_rank": 8, "lora_alpha": 3.0, "lora_targets": ["q_proj", "down_proj"]},
    "c": {"lora_rank": 2},
}


@pytest.fixture
def policy(tiny_model: Path) -> Policy:
    config = TrainConfig(base_model=str(tiny_model), per_node=PER_NODE)
    policy = Policy.load(str(tiny_model), agents_of(PER_NODE, config), device="cpu")
    torch.manual_seed(1)
    for parameters in policy.adapter_parameters.values():
        for parameter in parameters:
            torch.nn.init.normal_(parameter, std=0.1)
    policy.publish()
    return policy


def by_peft(policy: Policy, ids_BT: Tensor, agents: list[str | None]) -> Tensor:
    """Logits as PEFT's own pass over a mixed batch computes them."""
    names = [BASE if agent is None else f"node-{agent}" for agent in agents]
    with torch.no_grad():
        logits: Tensor = policy.model(input_ids=ids_BT, adapter_names=names).logits
    return logits


def by_rows(policy: Policy, ids_BT: Tensor, agents: list[str | None]) -> Tensor:
    with policy.using_rows(agents):
        return policy.logits(policy.hidden(ids_BT))


@pytest.mark.parametrize(
    "agents",
    [["a", "b", None, "c", "a"], ["b", "b"], [None, None], ["c"]],
    ids=["mixed", "one", "base", "single"],
)
def test_rows_are_what_peft_computes(policy: Policy, agents: list[str | None]) -> None:
    ids_BT = torch.randint(0, policy.vocabulary, (len(agents), 9))
    ours, theirs = by_rows(policy, ids_BT, agents), by_peft(policy, ids_BT, agents)
    assert (theirs - by_peft(policy, ids_BT, [None] * len(agents))).abs().max() > (
        0.1 if any(agents) else -1
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("agent", ["a", "b"])
def test_a_whole_batch_has_the_outputs_and_gradients_of_peft(policy: Policy, agent: str) -> None:
    ids_BT = torch.randint(0, policy.vocabulary, (3, 9))
    with policy.using(agent):
        ours = policy.logits(policy.hidden(ids_BT))
        torch.autograd.backward(ours.square().mean())
        gradients = [p.grad.clone() for p in policy.adapter_parameters[agent] if p.grad is not None]
        policy.model.zero_grad()
        # PEFT's own forward pass of each layer.
        for layer in policy._lora._layers:
            layer._layer.forward = layer._peft_forward  # type: ignore[method-assign]
        policy.model.set_adapter(f"node-{agent}")
        theirs = policy.logits(policy.hidden(ids_BT))
        torch.autograd.backward(theirs.square().mean())
        expected = [p.grad for p in policy.adapter_parameters[agent] if p.grad is not None]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert len(gradients) == len(expected) > 0
    for own, its in zip(gradients, expected, strict=True):
        torch.testing.assert_close(own, its, atol=1e-4, rtol=1e-3)


def test_rows_see_the_adapters_that_were_published(policy: Policy) -> None:
    ids_BT = torch.randint(0, policy.vocabulary, (2, 9))
    published = by_rows(policy, ids_BT, ["a", "b"])
    with torch.no_grad():
        for parameter in policy.adapter_parameters["a"]:
            parameter.mul_(2)
    assert torch.equal(by_rows(policy, ids_BT, ["a", "b"]), published)
    policy.publish()
    changed = by_rows(policy, ids_BT, ["a", "b"])
    assert not torch.allclose(changed[0], published[0], atol=1e-3)
    assert torch.equal(changed[1], published[1])


def test_rows_of_one_thread_do_not_reach_another(policy: Policy) -> None:
    ids_BT = torch.randint(0, policy.vocabulary, (1, 9))
    found: dict[str, Tensor] = {}

    def learner() -> None:
        with policy.using("c"), torch.no_grad():
            found["c"] = policy.logits(policy.hidden(ids_BT))

    with policy.using_rows(["a"]):
        thread = threading.Thread(target=learner)
        thread.start()
        thread.join(timeout=60)
        own = policy.logits(policy.hidden(ids_BT))
    torch.testing.assert_close(found["c"], by_peft(policy, ids_BT, ["c"]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(own, by_peft(policy, ids_BT, ["a"]), atol=1e-4, rtol=1e-4)


# The head of the tiny model is its embedding; PEFT warns that merging would have to untie them.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_what_a_backward_pass_runs_again_has_the_same_adapter(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers and chunks of logits that are made twice, the second time in another thread."""
    targets = {name: {"lora_targets": ["q_proj", "lm_head"]} for name in ("a", "b")}
    gradients = []
    for is_made_twice in (False, True):
        config = TrainConfig(base_model=str(tiny_model), per_node=targets)
        policy = Policy.load(str(tiny_model), agents_of(targets, config), device="cpu")
        for number, parameter in enumerate(policy.adapter_parameters["b"]):
            torch.manual_seed(number)
            torch.nn.init.normal_(parameter, std=0.1)
        if is_made_twice:
            policy.checkpoint_gradients()
            monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", 3 * policy.vocabulary)
        target_N = torch.arange(8)
        with policy.using("b"):
            hidden_NH = policy.hidden(torch.arange(8).unsqueeze(0))[0]
            logprobs_N, _ = logprobs.token_logprobs(
                hidden_NH, target_N, torch.ones(8), policy.bound(policy.logits), policy.vocabulary
            )
        backward = threading.Thread(target=logprobs_N.sum().backward)
        backward.start()
        backward.join(timeout=60)
        gradients.append([parameter.grad for parameter in policy.adapter_parameters["b"]])
        assert not any(p.grad is not None for p in policy.adapter_parameters["a"])
    for once, twice in zip(*gradients, strict=True):
        assert once is not None
        assert once.abs().max() > 0
        torch.testing.assert_close(twice, once)
