"""`math_equal`: whether two mathematical answers say the same, checked by math-verify.

Algebra on what a model wrote can take for ever, and neither a thread nor a signal can stop it (the
time limits of math-verify need the main thread, and a big power never looks at signals). So it runs
in worker processes, which are killed when they take too long. This file is also the workers' code.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from fractions import Fraction
from typing import IO, Any

from marft_graph.errors import ConfigError, RewardError

_MOST_WORKERS = 8
_START_SECONDS = 120.0
_MOST_BYTES = 4 * 2**30
# Decimals that need no algebra.
_PLAIN = re.compile(r"[+-]?(?:\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})")
# Further apart than math-verify rounds.
_APART = Fraction(1, 10**4)
_DELIMITERS = ("$", "\\(", "\\[", "\\boxed", "\\begin")
# Numbers, signs, single letters, LaTeX commands and common functions: no sentence.
_FORMULA = re.compile(
    r"[^A-Za-z]*(?:(?:\\[A-Za-z]+|sqrt|sin|cos|tan|log|ln|exp|pi|[A-Za-z])(?![A-Za-z])[^A-Za-z]*)*"
)


def math_equal(answer: str | float, expected: str | float, *, timeout: float = 2.0) -> bool:
    r"""Whether an answer is mathematically the expected one.

    Both may be LaTeX (`\frac{1}{2}`), plain (`1/2`, `0.5`), or a text with an answer in it (`so it
    is $x=3$`, `\boxed{7}`); of several answers in a text, math-verify takes the last or the boxed.

    Safe in threads, hence in rewards. Two plain decimals that are the same or clearly apart are
    compared at once; for anything else the first call starts a worker process, which takes a second
    or two.

    Args:
        answer: what the model wrote. One without mathematics in it is not equal.
        expected: the reference.
        timeout: seconds for the comparison. An answer that takes longer (`9^{9^{9^9}}`) is not
            equal: nobody could tell.

    Raises:
        ConfigError: math-verify is not installed.
        RewardError: `expected` holds no mathematics.

    >>> math_equal(r"so the answer is $\frac{2}{4}$", "0.5"), math_equal("x + 1", "x - 1")
    (True, False)
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError(
            "math_equal needs math-verify, which is not installed: pip install 'marft-graph[math]'"
        )
    texts = str(answer).strip(), str(expected).strip()
    if all(map(_PLAIN.fullmatch, texts)):
        difference = abs(Fraction(texts[0]) - Fraction(texts[1]))
        if difference == 0 or difference > _APART:
            return difference == 0
    with _pool.worker() as worker:
        verdict = worker.ask({"answer": str(answer), "expected": str(expected)}, timeout)
    if verdict == "unreadable":
        raise RewardError(
            f"math_equal: there is no mathematics in what is expected: {expected!r}; give a "
            "number, an expression or LaTeX"
        )
    return verdict == "equal"


class _Worker:
    """A process that compares answers: one line of JSON in and one out."""

    def __init__(self) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "marft_graph.rewards.maths"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths},
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the run, which then ends this by its pipe
        )
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="marft-math", daemon=True).start()
        if self._next(_START_SECONDS) != "ready":
            self.close()
            raise RewardError("math_equal: its worker process did not start")

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, question: dict[str, str], timeout: float) -> str:
        """`equal`, `different`, `unreadable`, or `slow`: then the process has been killed."""
        try:
            _stream(self._process.stdin).write(json.dumps(question) + "\n")
            _stream(self._process.stdin).flush()
        except OSError as error:
            self.close()
            raise RewardError(f"math_equal: its worker process ended: {error}") from error
        verdict = self._next(timeout)
        if verdict in ("slow", "dead"):
            self.close()
        if verdict == "dead":
            raise RewardError(f"math_equal: its worker process died of {question}")
        return verdict

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                _stream(stream).close()

    def _next(self, timeout: float) -> str:
        try:
            return self._answers.get(timeout=timeout)
        except queue.Empty:
            return "slow"

    def _read(self) -> None:
        with contextlib.suppress(ValueError, OSError):  # closed meanwhile
            for line in _stream(self._process.stdout):
                self._answers.put(line.strip())
        self._answers.put("dead")


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None  # all are pipes
    return stream


class _Pool:
    """Worker processes, started when first needed and ended with this process."""

    def __init__(self) -> None:
        self._places = threading.BoundedSemaphore(min(_MOST_WORKERS, os.cpu_count() or 1))
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def worker(self) -> Iterator[_Worker]:
        """A worker for oneself."""
        with self._places:
            with self._lock:
                found = self._idle.pop() if self._idle else None
            worker = found if found is not None and found.is_alive else _Worker()
            try:
                yield worker
            finally:
                if worker.is_alive:
                    with self._lock:
                        self._idle.append(worker)

    def close(self) -> None:
        """End the idle workers; the others end when their pipe does."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.close()


_pool = _Pool()
atexit.register(_pool.close)


# What the worker process does

# What algebra on nonsense ends in, where math-verify does not catch it itself.
_TOO_HARD = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


def _parsed(text: str) -> list[Any]:
    from math_verify import parse

    has_delimiter = any(mark in text for mark in _DELIMITERS)
    if not has_delimiter and _FORMULA.fullmatch(text.strip()):
        # A bare formula: without delimiters, `2*x` would be read as 2.
        found: list[Any] = parse(f"${text.strip()}$", parsing_timeout=None)
        if found:
            return found
    return list(parse(text, parsing_timeout=None))


def _compare(answer: str, expected: str) -> str:
    from math_verify import verify

    reference = _parsed(expected)
    if not reference:
        return "unreadable"
    try:
        is_equal = verify(reference, _parsed(answer), timeout_seconds=None)
    except _TOO_HARD:
        return "different"
    return "equal" if is_equal else "different"


def _serve() -> None:
    import math_verify  # noqa: F401 - slow; before the first question's clock runs

    with contextlib.suppress(ImportError, OSError, ValueError):  # not everywhere
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
    answers = sys.stdout
    sys.stdout = sys.stderr  # the pipe is for verdicts only
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(_compare(**json.loads(line)), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
