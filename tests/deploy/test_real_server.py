"""The road to production on a real vLLM server: export, the printed command, the app on it.

`make vllm-cpu` sets the server up; MARFT_VLLM_PYTHON names another environment's Python.
"""

from __future__ import annotations

import os
import shlex
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph

from marft_graph import bind
from marft_graph.deploy.manifest import read_manifest
from marft_graph.run.tracking import read_evaluations
from marft_graph.workflow import load_target

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
WAIT = 600

ON_THE_CPU = ("--dtype=float32", "--enforce-eager", "--max-model-len=512", "--max-num-seqs=64")
"""What this machine needs beside the printed command."""


def marft_graph(*arguments: object) -> str:
    command = [sys.executable, "-m", "marft_graph", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """math_duo, trained until it solves most problems."""
    folder = tmp_path_factory.mktemp("runs") / "duo"
    marft_graph("train", "workflows/math_duo", "--iterations", 12, "--run-dir", folder)
    return folder


@pytest.fixture(scope="module")
def served(
    run: Path, vllm_python: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, str]]:
    """The export, and a server that the printed command started."""
    folder = tmp_path_factory.mktemp("exports") / "duo"
    printed = marft_graph("export", run, folder)
    (line,) = [line for line in printed.splitlines() if line.strip().startswith("vllm serve")]
    program, *arguments = shlex.split(line)
    port = free_port()
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with (folder.parent / "vllm.log").open("w") as log:
        server = subprocess.Popen(
            [str(Path(vllm_python).with_name(program)), *arguments, *ON_THE_CPU, f"--port={port}"],
            stdout=log,
            stderr=log,
            env=environment,
        )
    try:
        deadline = time.monotonic() + WAIT
        while not is_answering(f"http://127.0.0.1:{port}/health"):
            said = (folder.parent / "vllm.log").read_text()[-2000:]
            assert server.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(1)
        yield folder, f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def is_answering(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def plain_app(base_url: str, max_tokens: int) -> Any:
    """math_duo as a team would write it for a server of its own."""
    from workflows.math_duo.graph import ACTOR_PROMPT, REASONER_PROMPT, State

    settings: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens, "max_retries": 1}
    settings |= {"base_url": base_url, "api_key": "not-needed", "timeout": 120}
    plans, answers = (ChatOpenAI(model=name, **settings) for name in ("reasoner", "actor"))

    def reasoner(state: State) -> dict[str, str]:
        return {"plan": plans.invoke([SystemMessage(REASONER_PROMPT), ask(state["question"])]).text}

    def actor(state: State) -> dict[str, str]:
        task = f"{state['question']}\n{state['plan']}"
        return {"answer": answers.invoke([SystemMessage(ACTOR_PROMPT), ask(task)]).text}

    ask = HumanMessage
    steps = [("reasoner", reasoner), ("actor", actor)]
    return StateGraph(State).add_sequence(steps).add_edge(START, "reasoner").compile()


def bound_app(base_url: str, folder: Path) -> Any:
    return bind(load_target("workflows/math_duo").graph, folder, base_url=base_url)


APPS: dict[str, Callable[[str, Path], Any]] = {
    "bind": bound_app,
    "plain ChatOpenAI": lambda url, folder: plain_app(url, read_manifest(folder).max_new_tokens),
}


@pytest.mark.parametrize("app", APPS)
def test_the_app_on_the_printed_server_has_the_trainers_greedy_return(
    run: Path, served: tuple[Path, str], app: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workflows.math_duo import task

    monkeypatch.chdir(ROOT)
    folder, url = served
    examples = list(task.generate()[1])
    trained = read_evaluations(run)[-1]
    assert trained["eval_episodes"] == len(examples)
    expected = trained["eval_return_greedy"]
    graph = APPS[app](url, folder)
    inputs = [{"question": example["question"]} for example in examples]
    states = graph.batch(inputs, {"max_concurrency": 16})
    rewards = [task.reward(e, s) for e, s in zip(examples, states, strict=True)]
    found = statistics.fmean(rewards)
    assert expected > 0.3  # it has learnt something to be reproduced
    assert found == pytest.approx(expected, abs=0.01)
