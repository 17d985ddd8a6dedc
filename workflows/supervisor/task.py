"""What supervisor is trained on: math_duo's word problems and its reward."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

from workflows.math_duo.task import load_data, reward

__all__ = ["load_data", "reward"]
