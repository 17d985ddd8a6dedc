"""What the README says of the package as a whole; its commands and code run in test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

import marft_graph

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_table_of_the_api_names_every_public_name() -> None:
    table = README.partition("## Public API")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|[^|]*\|", table, re.M))))
    assert named == set(marft_graph.__all__)


def test_the_first_screen_has_commands_pictures_and_code() -> None:
    screen = "\n".join(README.splitlines()[:50])
    assert "make demo" in screen
    assert screen.count("](docs/images/") == 2
    assert "from marft_graph import TrainConfig, Trainer, bind" in screen
