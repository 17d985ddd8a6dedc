"""The critic: one small value head per agent on the frozen base's hidden states.

The base runs once per call with adapters disabled; its hidden states serve the reference
log-probs and the values alike, so a critic costs no forward pass of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """Value of a state from the base's last hidden state: norm, one hidden layer, one number.

    The last layer starts at zero, so that an untrained critic adds no noise to the advantages.
    """

    def __init__(self, hidden_size: int, width: int = 128) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.hidden = nn.Linear(hidden_size, width)
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """Values (N,) in units of reward, fp32."""
        features = torch.tanh(self.hidden(self.norm(hidden_NH.float())))
        values: Tensor = self.out(features).squeeze(-1)
        return values
