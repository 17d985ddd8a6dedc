"""The oldest versions that pyproject.toml admits, as constraints for pip.

    python tests/versions.py > oldest.txt

Each requirement with a lower bound gets a line, those of the extras that the tests need included;
what these require in turn is left to pip.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
EXTRAS = ("openai", "langchain", "math", "grammar", "tensorboard", "ray", "dev")


def oldest(project: Path = PROJECT) -> list[str]:
    """`name==version` of every lower bound."""
    described = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    extras = described["optional-dependencies"]
    lines = [*described["dependencies"], *(line for name in EXTRAS for line in extras[name])]
    pins = []
    for requirement in map(Requirement, lines):
        lower = [each.version for each in requirement.specifier if each.operator in (">=", "==")]
        if lower and requirement.name != described["name"]:
            pins.append(f"{requirement.name}=={lower[0]}")
    return sorted(set(pins))


if __name__ == "__main__":
    sys.stdout.write("\n".join(oldest()) + "\n")
