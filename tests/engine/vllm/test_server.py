"""A server process of ours: it starts, is started again, and never outlives us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from marft_graph.engine.vllm.server import (
    ServerProcess,
    require_vllm,
    server_command,
)
from marft_graph.errors import ConfigError, EngineError

STAND_IN = str(Path(__file__).with_name("stand_in.py"))
WAIT = 60


@pytest.fixture
def process(tmp_path: Path) -> Iterator[ServerProcess]:
    process = ServerProcess(sys.executable, [STAND_IN], tmp_path / "run" / "vllm.log")
    yield process
    process.stop()


def is_answering(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def ensure_until_it_fails(process: ServerProcess) -> None:
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        process.ensure_running()
        time.sleep(0.05)


def test_it_serves_on_its_port_until_it_is_stopped(process: ServerProcess) -> None:
    process.ensure_running()
    wait_for(lambda: is_answering(process.url))
    pid = process.pid
    assert pid is not None
    process.ensure_running()
    assert process.pid == pid
    process.stop()
    assert not is_alive(pid)
    assert not is_answering(process.url)
    assert "the stand-in starts" in process.log.read_text()


def test_a_stopped_process_ends_too(process: ServerProcess) -> None:
    process.ensure_running()
    pid = process.pid
    assert pid is not None
    wait_for(lambda: is_answering(process.url))
    os.kill(pid, signal.SIGSTOP)
    process.stop()
    assert not is_alive(pid)


def test_one_that_served_is_started_again_on_its_port(process: ServerProcess) -> None:
    process.ensure_running()
    wait_for(lambda: is_answering(process.url))
    process.has_served = True
    first = process.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)

    def is_started_again() -> bool:
        process.ensure_running()  # its threads end one by one, and it with the last
        return process.restarts == 1

    wait_for(is_started_again)
    wait_for(lambda: is_answering(process.url))
    assert process.pid != first


def test_one_that_ends_before_it_serves_is_an_error_with_its_log(tmp_path: Path) -> None:
    command = ["-c", "import sys; sys.exit('this machine is too small')"]
    process = ServerProcess(sys.executable, command, tmp_path / "vllm.log")
    with pytest.raises(EngineError, match=r"exit code 1.*\n.*this machine is too small"):
        ensure_until_it_fails(process)


def test_one_that_keeps_ending_is_given_up(tmp_path: Path) -> None:
    process = ServerProcess(sys.executable, ["-c", "pass"], tmp_path / "vllm.log")
    process.has_served = True
    with pytest.raises(EngineError, match="started again 3 times"):
        ensure_until_it_fails(process)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends the child of a killed process")
def test_it_ends_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from marft_graph.engine.vllm.server import ServerProcess\n"
        f"p = ServerProcess(sys.executable, [{STAND_IN!r}], Path({str(tmp_path)!r}) / 'log')\n"
        "p.ensure_running(); print(p.pid, p.url, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        pid, url = parent.stdout.readline().split()
        wait_for(lambda: is_answering(url))
    finally:
        parent.kill()
        parent.communicate(timeout=WAIT)
    wait_for(lambda: not is_alive(int(pid)))


def test_it_listens_on_loopback_and_its_key_is_not_on_the_command_line(
    process: ServerProcess,
) -> None:
    process.ensure_running()
    wait_for(lambda: is_answering(process.url))
    line = Path(f"/proc/{process.pid}/cmdline").read_text()
    assert "stand_in.py" in line
    assert "--host\x00127.0.0.1\x00" in line
    assert process.api_key not in line


def test_the_users_arguments_come_last() -> None:
    command = server_command(
        "org/model", dtype="float32", max_rank=12, adapters=3, more=["--max-model-len=64"]
    )
    assert command[-1] == "--max-model-len=64"
    assert command[command.index("--max-lora-rank") + 1] == "16"
    assert command[command.index("--logprobs-mode") + 1] == "processed_logprobs"


def test_only_on_a_cpu_are_prompts_computed_in_one_piece() -> None:
    for on_cpu in (False, True):
        command = server_command("m", dtype="float32", max_rank=8, adapters=2, on_cpu=on_cpu)
        assert ("--no-enable-chunked-prefill" in command) == on_cpu


def test_a_python_that_is_none_and_a_missing_vllm_are_told() -> None:
    with pytest.raises(ConfigError, match="vllm_python is 'no/such/python'"):
        require_vllm("no/such/python")
    with pytest.raises(ConfigError, match=r"make vllm-cpu.*vllm_python.*engine_urls"):
        require_vllm("")
    assert require_vllm(sys.executable) == sys.executable
