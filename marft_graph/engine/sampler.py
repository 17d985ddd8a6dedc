"""The next token of each row of the running batch, from its logits and a uniform number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from marft_graph.engine.running import Running
from marft_graph.errors import EngineError, MarftError
from marft_graph.policy.logprobs import FORBIDDEN, constrained, scaled_logprobs


def constrain(rows: Sequence[Running], logits_BV: Tensor) -> Tensor:
    """Logits without the tokens that the rows' grammars forbid; other rows stay as they are.

    A row whose model cannot write what its grammar asks for fails, and nothing constrains it.
    """
    places, allowed = [], []
    for place, row in enumerate(rows):
        if row.grammar is None:
            continue
        try:
            allowed.append(row.grammar.allowed())
            places.append(place)
        except MarftError as error:
            row.failure, row.grammar = error, None
        except Exception as error:  # noqa: BLE001 - this call's alone
            row.failure, row.grammar = EngineError(f"a grammar failed: {error!r}"), None
    if not places:
        return logits_BV
    place_M = torch.tensor(places, device=logits_BV.device)
    allowed_MW = torch.stack(allowed).to(logits_BV.device)
    logits_BV = logits_BV.float()
    return logits_BV.index_copy(0, place_M, constrained(logits_BV[place_M], allowed_MW))


def sample(logits_BV: Tensor, temperature_B: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B,) by inverse transform of one uniform number each, and their log-probs (B,).

    Temperature 0 takes the most likely token; its log-prob is the one at temperature 1.

    >>> logits = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    >>> sample(logits, torch.tensor([1.0, 0.0]), torch.tensor([0.7, 0.1]))[0]
    tensor([1, 1])
    """
    logp_BV = scaled_logprobs(logits_BV, temperature_B)
    cdf_BV = logp_BV.exp().cumsum(-1)
    # right=True skips tokens of probability zero, whose cdf equals their predecessor's
    drawn_B = torch.searchsorted(
        cdf_BV, (uniform_B * cdf_BV[:, -1]).unsqueeze(-1), right=True
    ).squeeze(-1)
    drawn_B = drawn_B.clamp_max(logits_BV.shape[-1] - 1)
    # A sum that rounding ends too early must not draw what a grammar forbids.
    is_possible_B = logp_BV.gather(-1, drawn_B.unsqueeze(-1)).squeeze(-1) > FORBIDDEN / 2
    is_drawn_B = (temperature_B > 0) & is_possible_B
    token_B = torch.where(is_drawn_B, drawn_B, logits_BV.argmax(-1))
    return token_B, logp_BV.gather(-1, token_B.unsqueeze(-1)).squeeze(-1)
