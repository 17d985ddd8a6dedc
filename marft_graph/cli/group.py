"""The command `marft-graph` itself: how errors, warnings and signals reach the terminal.

Exit codes are in `EXIT_CODES`. Text that a model may have written (it is in some error messages)
reaches the terminal with its control characters made visible.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from typing import Any

import click

from marft_graph.errors import (
    ConfigError,
    DatasetError,
    GraphError,
    MarftError,
    ModelError,
    WorkflowError,
)
from marft_graph.secret import without_secrets
from marft_graph.visible import visible

EXIT_CODES = """\b
Exit codes:
  0    done
  1    the run failed, or its folder cannot be used
  2    the input was wrong: an option, a setting, a graph, a data set, a model, a workflow
  130  stopped by SIGINT (Ctrl-C), 143 by SIGTERM. The first signal finishes the
       running step and writes a checkpoint, from which --resume continues; a
       second one stops at once, and the last checkpoint stays.
"""
_BAD_INPUT = (ConfigError, GraphError, DatasetError, ModelError, WorkflowError)


class _Commands(click.Group):
    """Turns the package's own errors into one line; any other exception keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _shown_warnings():
                return super().invoke(ctx)
        except MarftError as error:
            message = visible(without_secrets(" ".join(str(error).split())))
            click.secho(f"error: {message}", fg="red", err=True)
            ctx.exit(2 if isinstance(error, _BAD_INPUT) else 1)
        except KeyboardInterrupt as error:
            click.secho("stopped", fg="red", err=True)
            ctx.exit(128 + getattr(error, "signum", signal.SIGINT))


class _VisibleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(without_secrets(super().format(record)))


@contextlib.contextmanager
def _shown_warnings() -> Iterator[None]:
    """The package's warnings go to stderr, whatever is in them."""
    package = logging.getLogger("marft_graph")
    handler = logging.StreamHandler()
    handler.setFormatter(_VisibleFormatter("%(message)s"))
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)


@click.group(
    cls=_Commands, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="marft-graph")
def main() -> None:
    """Train a LangGraph app with one LoRA adapter per node, and use what was trained.

    A WORKFLOW is a folder with graph.py (the app), task.py (data and reward) and config.yaml.
    """
