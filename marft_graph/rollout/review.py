"""Answering the app's interrupts: the user's reviewer is asked, and the run goes on.

LangGraph runs an interrupted node again from its start. Knows neither models nor learning.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import reprlib
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from langgraph.types import Command, StateSnapshot

from marft_graph.errors import ReviewerError
from marft_graph.rollout.copies import own_copy
from marft_graph.rollout.inputs import Reviewer
from marft_graph.rollout.rewards import shown
from marft_graph.rollout.scopes import outside_runs

_WHAT_TO_DO = (
    "give `on_interrupt=`, a function (example, state, interrupt) that returns what a person would "
    "answer, or train a graph that does not interrupt"
)


@dataclass(frozen=True, slots=True)
class Review:
    """Who answers the interrupts of one episode.

    Args:
        reviewer: the user's function; None: nobody.
        example: of the episode.
        workers: runs synchronous reviewers.
        timeout: seconds that one answer may take.
        limit: interrupts that an episode may go through.
        outside: the context around the episode: a reviewer is no part of the app.
    """

    reviewer: Reviewer | None
    example: Mapping[str, Any]
    workers: Executor
    timeout: float
    limit: int
    outside: contextvars.Context

    async def resume(self, waiting: StateSnapshot) -> Command[Any] | None:
        """What the app is called with to go on.

        Each interrupt gets an answer of its own. Where the run has only stopped before or after a
        node (`interrupt_before`, `interrupt_after`), nothing is asked, and it goes on.

        Raises:
            ReviewerError: the reviewer raised or took too long.
        """
        answers = {
            interrupt.id: await self._answer(waiting.values, interrupt)
            for interrupt in waiting.interrupts
        }
        return Command(resume=answers) if answers else None

    async def _answer(self, state: Any, interrupt: Any) -> Any:
        if self.reviewer is None:
            raise ReviewerError("there is no reviewer")
        work = self.outside.copy().run(self._begun, self.reviewer, state, interrupt)
        done, _ = await asyncio.wait([work], timeout=self.timeout)
        if not done:
            work.cancel()
            problem, cause = f"took longer than {self.timeout:g} seconds (reward_timeout)", None
        elif work.cancelled():
            problem, cause = "raised CancelledError", None
        elif (cause := work.exception()) is not None:
            problem = f"raised {type(cause).__name__}: {cause}"
        else:
            return work.result()
        raise ReviewerError(
            f"on_interrupt {problem}, asked {reprlib.repr(interrupt.value)} on example "
            f"{shown(self.example)}"
        ) from cause

    def _begun(self, reviewer: Reviewer, state: Any, interrupt: Any) -> asyncio.Task[Any]:
        with outside_runs():
            return asyncio.create_task(self._asked(reviewer, state, interrupt))

    async def _asked(self, reviewer: Reviewer, state: Any, interrupt: Any) -> Any:
        example = own_copy(self.example)
        if inspect.iscoroutinefunction(reviewer) or inspect.iscoroutinefunction(
            getattr(reviewer, "__call__", None)  # noqa: B004 - an object with an async __call__
        ):
            return await reviewer(example, state, interrupt)
        context = contextvars.copy_context()
        thread = self.workers.submit(context.run, reviewer, example, state, interrupt)
        answer = await asyncio.wrap_future(thread)
        return await answer if inspect.isawaitable(answer) else answer


def told(waiting: StateSnapshot | None, *, after: int = 0) -> str:
    """What to say of an episode that stays interrupted.

    Args:
        waiting: where it stands, if that is known.
        after: how many of its interrupts were answered before.
    """
    if after:
        return (
            f"the app was interrupted again after {after} answers of on_interrupt, as many as "
            "recursion_limit allows: a loop that asks until it is content needs answers that make "
            "it so, or a higher recursion_limit"
        )
    if waiting is None or waiting.interrupts:
        asked = "" if waiting is None else f" ({reprlib.repr(waiting.interrupts[0].value)})"
        return f"the app called interrupt(){asked} and waits for a person: {_WHAT_TO_DO}"
    nodes = ", ".join(map(repr, waiting.next))
    return (
        f"the app stopped before {nodes} (interrupt_before or interrupt_after) and waits for a "
        "person: give `on_interrupt=`, with which it goes on there, or train a graph that is "
        "compiled without"
    )
