from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from marft_graph.policy import adapters
from marft_graph.policy import segments as module
from marft_graph.policy.adapters import Policy
from marft_graph.policy.rows import Row, lay_out, seen
from marft_graph.policy.segments import Segments, _Alone, _Padded, read_segments
from tests.support import make_agents

CPU = torch.device("cpu")
SIZE = 4

sequences = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple), min_size=1, max_size=12
)


def by_mask(q: Tensor, k: Tensor, v: Tensor, rows: list[Row]) -> Tensor:
    """Attention written out over the whole row, (B, T, H, S)."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / SIZE**0.5
    scores = scores.masked_fill(~torch.from_numpy(seen(rows)).unsqueeze(1), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("masked", [0, 20, 2**20], ids=["alone", "some alone", "masked"])
@given(sequences, st.integers(1, 60), st.sampled_from([1, 2]))
def test_tokens_read_what_a_mask_over_the_row_lets_them_read(
    masked: int, ids: list[tuple[int, ...]], max_tokens: int, groups: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MASKED", masked)
        check_against_a_mask(ids, max_tokens, groups)


def check_against_a_mask(ids: list[tuple[int, ...]], max_tokens: int, groups: int) -> None:
    rows = lay_out(ids, max_tokens)
    length = max(row.length for row in rows)
    torch.manual_seed(len(ids))
    shapes = [(len(rows), heads, length, SIZE) for heads in (2, 2 // groups, 2 // groups)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weight = torch.randn(len(rows), length, 2, SIZE, dtype=torch.float64)
    for number, row in enumerate(rows):
        weight[number, row.length :] = 0  # padding means nothing
    segments = Segments(rows, CPU, torch.float64)
    ours = segments.attend(*inputs, SIZE**-0.5) * weight
    theirs = by_mask(*inputs, rows) * weight
    torch.testing.assert_close(ours, theirs)
    own = torch.autograd.grad(ours.sum(), inputs)
    for gradient, expected in zip(own, torch.autograd.grad(theirs.sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_answers_to_one_prompt_are_not_scored_against_each_other() -> None:
    prompt = tuple(range(100))
    rows = lay_out([(*prompt, *range(100 + 50 * i, 150 + 50 * i)) for i in range(8)], 1000)
    segments = Segments(rows, CPU, torch.float32)
    scores = sum(p._hidden[1].numel() for p in segments._products if isinstance(p, _Padded))
    assert all(isinstance(product, _Padded) for product in segments._products)
    assert rows[0].length == 500
    assert scores < 500 * 500 / 2


def test_a_long_sequence_needs_no_mask_of_its_length_squared() -> None:
    prompt = tuple(range(3000))
    ids = [(*prompt, *range(5000 + i, 7000 + i)) for i in range(2)]  # 2,000 own tokens each
    segments = Segments(lay_out(ids, 10_000), CPU, torch.float32)
    masks = [own._hidden for own in segments._products if isinstance(own, _Alone)]
    assert sum(mask is None for mask in masks) == 1  # the first reads what stands before it
    kept = [mask.untyped_storage().nbytes() for mask in masks if mask is not None]
    assert kept == [4 * (2000 + 5000 - 1)]


def states(policy: Policy, rows: list[Row]) -> list[Tensor]:
    """The states of rows' tokens without their padding."""
    with torch.no_grad(), policy.using("a"):
        return [
            policy.states_of(rows, torch.full((row.length,), place), torch.arange(row.length))
            for place, row in enumerate(rows)
        ]


def test_a_model_without_segments_takes_a_mask(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = lay_out([(1, 2, 3, 4), (1, 2, 5), (1, 2, 5, 6), (7, 8, 9)], 100)
    assert len(rows) == 2
    with_segments = Policy.load(str(tiny_model), make_agents(["a"], tiny_model), device="cpu")
    used: list[str] = []
    attend = Segments.attend

    def counted(self: Segments, *args: Any, **options: Any) -> Tensor:
        used.append("segments")
        return attend(self, *args, **options)

    monkeypatch.setattr(Segments, "attend", counted)
    expected = states(with_segments, rows)
    assert used
    monkeypatch.setattr(adapters, "read_segments", lambda *_: False)
    used.clear()
    without = Policy.load(str(tiny_model), make_agents(["a"], tiny_model), device="cpu")
    for own, other in zip(states(without, rows), expected, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)
    assert not used


@pytest.mark.parametrize("way", ["ignores", "refuses"])
def test_a_model_whose_attention_does_not_ask_is_left_as_it_was(
    tiny_model: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.load(str(tiny_model), make_agents(["a"], tiny_model), device="cpu")
    base: Any = policy.model.get_base_model()
    layer = base.model.layers[1]
    forward = layer.forward

    def without(*args: Any, segments: Any = None, **options: Any) -> Any:
        if way == "refuses" and segments is not None:
            raise TypeError("forward() got an unexpected keyword argument 'segments'")
        return forward(*args, **options)

    monkeypatch.setattr(layer, "forward", without)
    base.set_attn_implementation("sdpa")
    assert not read_segments(base, base.model)
    assert base.config._attn_implementation == "sdpa"
    monkeypatch.undo()
    assert read_segments(base, base.model)
