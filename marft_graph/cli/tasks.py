"""What several commands do: load a workflow, its data and reward; words they share."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from marft_graph.errors import DatasetError, WorkflowError

if TYPE_CHECKING:
    from marft_graph.evaluation import Evaluation
    from marft_graph.workflow import Workflow

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)


def load_task(name: str) -> tuple[Workflow, Callable[..., Any], Callable[..., Any]]:
    """The workflow, and the two functions without which it cannot be run: data and reward.

    Raises:
        WorkflowError: it cannot be loaded, or lacks one of the two.
    """
    from marft_graph.workflow import load_target

    target = load_target(name)
    if target.load_data is None or target.reward is None:
        parts = {"load_data": target.load_data, "reward": target.reward}
        missing = " and no ".join(part for part, function in parts.items() if function is None)
        raise WorkflowError(
            f"{name} has no {missing}; this command needs a workflow folder whose task.py defines "
            "both (to train a graph of your own without one: marft_graph.Trainer)"
        )
    return target, target.load_data, target.reward


def chosen_dataset(settings: dict[str, Any], given: str | None) -> str | None:
    """Take `dataset` out of the settings: it belongs to the workflow, not to `TrainConfig`."""
    configured = settings.pop("dataset", None)
    return configured if given is None else given


def loaded(load_data: Callable[..., Any], dataset: str | None, workflow: str) -> tuple[Any, Any]:
    """Training and held-out examples; where no data set is named, the workflow's own choice.

    Raises:
        DatasetError: `load_data` refused, or returned something else than a pair.
    """
    asked = f"load_data({'' if dataset is None else repr(dataset)}) of {workflow}"
    try:
        loaded = load_data() if dataset is None else load_data(dataset)
    except (ValueError, OSError) as error:  # bad names and paths: the message says it all
        raise DatasetError(f"{asked}: {error}") from error
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise DatasetError(
            f"{asked}: {type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
        ) from error
    if not isinstance(loaded, tuple) or len(loaded) != 2:
        raise DatasetError(
            f"{asked} returned a {type(loaded).__name__}; it must return a tuple of two data sets, "
            "to train on and held out (None where there is none)"
        )
    return loaded


def usage(folder: Path) -> str:
    """How an export is used, in Python."""
    return (
        "Use them in your app (`graph` is your LangGraph app, unchanged):\n\n"
        "    from marft_graph import bind\n"
        f"    app = bind(graph, {str(folder)!r})"
    )


def shown(evaluation: Evaluation | None) -> str:
    """A measured return in words."""
    if evaluation is None:
        return "not measured"
    failed = f" ({evaluation.episodes_failed} failed)" if evaluation.episodes_failed else ""
    return f"{evaluation.return_mean:.3f} ± {evaluation.return_stderr:.3f}{failed}"
