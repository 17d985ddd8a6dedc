"""States of some tokens alone: those of a whole pass, and their gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from marft_graph.policy.adapters import Policy
from marft_graph.policy.last_layer import narrow_last_layer
from marft_graph.policy.rows import lay_out
from tests.support import make_agents

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
PLACES = torch.tensor([6, 1, 6, 9])


def decoder_of(kind: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE)
    model = AutoModel.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_wanted_states_and_gradients_are_those_of_the_whole_pass(kind: str) -> None:
    decoder = decoder_of(kind)
    ids_BT = torch.randint(1, 32, (2, 5))
    theirs = decoder(input_ids=ids_BT).last_hidden_state.flatten(0, 1)[PLACES]
    weights = list(decoder.parameters())
    expected = torch.autograd.grad(theirs.square().sum(), weights)
    assert narrow_last_layer(decoder)
    ours = decoder(input_ids=ids_BT, wanted=PLACES).last_hidden_state[0]
    torch.testing.assert_close(ours, theirs)
    for gradient, whole in zip(
        torch.autograd.grad(ours.square().sum(), weights), expected, strict=True
    ):
        torch.testing.assert_close(gradient, whole, atol=1e-4, rtol=1e-4)
    assert decoder(input_ids=ids_BT).last_hidden_state.shape == (2, 5, 32)


@pytest.mark.parametrize("kind", ["olmo2", "gemma2", "granite", "cohere", "gpt_neox"])
def test_a_layer_of_another_shape_stays_as_it_was(kind: str) -> None:
    more = {"residual_multiplier": 0.5} if kind == "granite" else {}
    torch.manual_seed(0)
    decoder = AutoModel.from_config(AutoConfig.for_model(kind, **SHAPE | more)).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ids_BT = torch.randint(1, 32, (2, 5))
    before = decoder(input_ids=ids_BT).last_hidden_state
    assert not narrow_last_layer(decoder)
    torch.testing.assert_close(decoder(input_ids=ids_BT).last_hidden_state, before)


class Counted(torch.nn.Module):
    """Notes how many tokens pass."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        self.tokens: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.tokens.append(x.shape[0] * x.shape[1])
        result: Tensor = self.module(x)
        return result


def test_the_last_mlp_runs_for_each_state_that_is_asked_for_once(tiny_model: Path) -> None:
    policy = Policy.load(str(tiny_model), make_agents(["a", "b"], tiny_model), device="cpu")
    layers: Any = policy._decoder.layers
    counted = [Counted(layer.mlp) for layer in layers]
    for layer, mlp in zip(layers, counted, strict=True):
        layer.mlp = mlp
    rows = lay_out([(1, 2, 3, 4), (1, 2, 5), (7, 8, 9)], 100)
    row_N, column_N = torch.tensor([0, 0, 1, 0]), torch.tensor([3, 4, 2, 3])
    with torch.no_grad(), policy.using("a"):
        picked = policy.states_of(rows, row_N, column_N)
    assert [mlp.tokens for mlp in counted] == [[10]] * (len(layers) - 1) + [[3]]
    torch.testing.assert_close(picked[0], picked[3])
    with torch.no_grad(), policy.using_rows(["a", "b"]):  # which adapter is a matter of the row
        mixed = policy.states_of(rows, row_N, column_N)
    assert counted[-1].tokens[-1] == 10
    torch.testing.assert_close(mixed, picked, atol=1e-5, rtol=1e-5)
