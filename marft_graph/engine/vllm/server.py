"""A vLLM server as a process of ours: started on a free port of this machine, stopped with us.

Knows the command line of vLLM's server and nothing of what is asked of it.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from marft_graph.errors import ConfigError, EngineError

logger = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_STOP_SECONDS, _KILL_SECONDS = 10.0, 60.0
_MAX_RESTARTS = 3
_LOG_TAIL_BYTES = 65536
_LOG_TAIL_LINES = 12
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Runs in the server's Python before vLLM does: on Linux the kernel ends the server when the thread
# that started it is gone, however it went. (A `preexec_fn` is not safe in a process with threads.)
_LAUNCH = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the process that started this server is gone")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class ServerProcess:
    """A vLLM server that this process starts and stops.

    Args:
        command: Python's arguments after the interpreter; the port is appended.
        python: the interpreter that has vLLM.
        log: where its output goes.

    Start it from a thread that lives as long as the server shall.
    """

    def __init__(self, python: str, command: Sequence[str], log: Path) -> None:
        self.log = log
        self.port = _free_port()
        self.url = f"http://{_HOST}:{self.port}"
        self.api_key = secrets.token_urlsafe(24)
        self.has_served = False
        """Whether it has ever answered."""
        self.restarts = 0
        self._command = [python, "-c", _LAUNCH, str(os.getpid()), *command]
        self._process: subprocess.Popen[bytes] | None = None
        _running.add(self)

    @property
    def pid(self) -> int | None:
        """Process id, once it was started."""
        return None if self._process is None else self._process.pid

    def ensure_running(self) -> None:
        """Start the server, or start it again on its port where it has ended after serving.

        Raises:
            EngineError: it ended before it ever served, or too often; the message has the end of
                its log.
        """
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return
            said = f"the vLLM server of this run ended with {_ending(code)}; {self._log_tail()}"
            self.stop()  # what is left of its process group
            if not self.has_served:
                raise EngineError(said)
            if self.restarts >= _MAX_RESTARTS:
                raise EngineError(f"{said}\n(It was started again {_MAX_RESTARTS} times.)")
            self.restarts += 1
            logger.warning("%s\nStarting it again", said)
        self._start()

    def stop(self) -> None:
        """End the server with everything it started; what does not end in time is killed."""
        process, self._process = self._process, None
        if process is None:
            return
        for sent, patience in ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, _KILL_SECONDS)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, sent)
                os.killpg(process.pid, signal.SIGCONT)  # a stopped process would not hear it
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)

    def _start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as stream:
            try:
                self._process = subprocess.Popen(
                    [*self._command, "--host", _HOST, "--port", str(self.port)],
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=_environment(self.api_key),
                )
            except OSError as error:
                raise EngineError(f"cannot start {self._command[0]}: {error}") from error
        logger.info("started a vLLM server at %s, log in %s", self.url, self.log)

    def _log_tail(self) -> str:
        try:
            text = self.log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
        except OSError as error:
            return f"its log cannot be read: {error}"
        lines = text.rstrip().splitlines()
        # vLLM reports the cause in one process, and its consequences in others after it.
        causes = [line for line in lines[:-_LOG_TAIL_LINES] if "Error: " in line]
        told = "\n".join([*causes[:2], *lines[-_LOG_TAIL_LINES:]])
        return f"the end of {self.log}:\n{told}"


def server_command(
    base_model: str,
    *,
    dtype: str,
    max_rank: int,
    adapters: int,
    on_cpu: bool = False,
    trust_remote_code: bool = False,
    more: Sequence[str] = (),
) -> list[str]:
    """Arguments that make Python serve a base model whose adapters come and go.

    Log-probs are those of the distribution that is sampled from, and the model's own sampling
    defaults are off. `more` comes last, so it wins.
    """
    flags = ["--trust-remote-code"] if trust_remote_code else []
    if on_cpu:
        # vLLM 0.32 on a CPU ends with "CPU Generator does not use offset" where it computes a
        # prompt in parts for a call that has a seed.
        flags.append("--no-enable-chunked-prefill")
    options = {
        "--model": base_model,
        "--served-model-name": "base",
        "--dtype": dtype,
        "--max-lora-rank": str(served_rank(max_rank)),
        "--max-loras": str(adapters),
        "--max-cpu-loras": str(2 * adapters),  # a version and the one before it
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",
    }
    # The `vllm` command looks for a package of that name, which vllm-cpu is not.
    return [
        "-m",
        "vllm.entrypoints.openai.api_server",
        *(word for option in options.items() for word in option),
        "--enable-lora",
        *flags,
        *more,
    ]


def served_rank(rank: int) -> int:
    """The smallest of the bounds that vLLM takes for the rank of adapters with room for `rank`.

    >>> served_rank(4), served_rank(16), served_rank(40)
    (8, 16, 64)
    """
    return next((bound for bound in _LORA_RANKS if bound >= rank), rank)


def require_vllm(python: str) -> str:
    """The interpreter that will run the server: the one that is named, else this one.

    Raises:
        ConfigError: there is no such program, or none is named and vLLM is not installed here.
    """
    if python:
        found = shutil.which(os.path.expanduser(python))
        if found is None:
            raise ConfigError(
                f"vllm_python is {python!r}, which is no program; it must be the Python of the "
                "environment that has vLLM, such as .venv-vllm/bin/python"
            )
        return os.path.abspath(found)
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "engine is vllm, and this Python has no vLLM. Install it in an environment of its own "
            "(python -m venv .venv-vllm && .venv-vllm/bin/pip install vllm; on a CPU: make "
            "vllm-cpu) and set vllm_python to .venv-vllm/bin/python, or set engine_urls to servers "
            "that run"
        )
    return sys.executable


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _environment(api_key: str) -> Mapping[str, str]:
    own = {
        "VLLM_API_KEY": api_key,  # not on the command line, which every user of the machine sees
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    # Where packages are found is a matter of our environment, not of the server's.
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return {**inherited, **own}


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


_running: weakref.WeakSet[ServerProcess] = weakref.WeakSet()


@atexit.register
def _stop_servers() -> None:
    for server in list(_running):
        server.stop()
