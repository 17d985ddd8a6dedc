"""The command line: `marft-graph train`, `trace`, `warm-start`, `eval`, `inspect` and `export`.

Owns words on the terminal and exit codes; the library does the work. A module for each command or
two. The heavy imports (torch and what stands on it) happen inside the commands, so that `--help`
answers at once.
"""

from marft_graph.cli import evaluate, export, inspect, teach, train
from marft_graph.cli.group import main

__all__ = ["evaluate", "export", "inspect", "main", "teach", "train"]
