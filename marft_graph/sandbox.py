"""Run a program that a model wrote: in a process of its own that can harm nothing.

The process has no environment, no network, no files but Python's own library to read and none to
write, starts no other process, and is limited in time, memory and output. Before anything runs,
every limit is tried once; where one does not hold, nothing is run at all. Linux on x86_64, with
Landlock (kernel 5.13) and seccomp; needs no privileges.

It shares the kernel with everything else: see SECURITY.md for what that means.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import platform
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from marft_graph.errors import SandboxError
from marft_graph.sandbox_child import CANNOT_LIMIT

_CHILD = Path(__file__).with_name("sandbox_child.py")
_SYSTEM = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_PROBE_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class SandboxResult:
    """What became of a program."""

    ended: Literal["exit", "timeout", "output"]
    """By itself or through one of the kernel's limits; at its deadline; or it wrote too much."""
    exit_code: int
    """As of any process: negative for the number of the signal that ended it."""
    stdout: str
    stderr: str

    @property
    def ok(self) -> bool:
        """Whether the program ran to its end without an error."""
        return self.ended == "exit" and self.exit_code == 0


def run_python(
    code: str,
    *,
    stdin: str = "",
    timeout: float = 5.0,
    memory: int = 256 * 2**20,
    output: int = 64 * 2**10,
) -> SandboxResult:
    r"""Run a Python program in the sandbox.

    Args:
        code: the program; it has the standard library, and nothing else to import.
        stdin: what `input()` reads.
        timeout: seconds by the clock, and of processor time.
        memory: bytes of address space.
        output: bytes of stdout and stderr that are kept; a program that writes more is ended.

    Raises:
        SandboxError: a limit cannot be set on this system, or does not hold.
        ValueError: an argument is out of range.

    >>> run_python("print(6 * 7)").stdout
    '42\n'
    """
    if not (0 < timeout <= 3600 and memory >= 64 * 2**20 and output >= 1):
        raise ValueError(
            f"timeout is {timeout}, memory {memory} and output {output}; they must be above 0 and "
            "at most 3600 seconds, at least 64 MiB, and at least 1 byte"
        )
    require_sandbox()
    return _run(code, stdin, timeout, memory, output)


@functools.cache
def require_sandbox() -> None:
    """Try every limit of the sandbox once in this process.

    Raises:
        SandboxError: names the limits that cannot be set or do not hold.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise SandboxError(
            f"model-written code is run on Linux and x86_64 only, not on {sys.platform} and "
            f"{platform.machine()}: its limits cannot be set here"
        )
    with tempfile.TemporaryDirectory(prefix="marft-probe-") as folder:
        canary = Path(folder) / "canary"
        canary.write_text("canary", encoding="utf-8")
        probe = _PROBE.replace("CANARY", repr(str(canary))).replace("PARENT", str(os.getpid()))
        result = _run(probe, "", _PROBE_SECONDS, 128 * 2**20, 2**16)
        if not result.ok or not canary.exists():
            raise SandboxError(f"the sandbox does not work here: {result.stderr.strip()[-500:]}")
    held = set(result.stdout.split())
    failed = [name for name in _PROBED if name not in held]
    if failed:
        raise SandboxError(f"model-written code is not run here: no limit on {', '.join(failed)}")
    result = _run("while True: pass", "", 0.5, 128 * 2**20, 2**16)
    if result.ended != "timeout":
        raise SandboxError("model-written code is not run here: no limit on time")


def _run(code: str, stdin: str, timeout: float, memory: int, output: int) -> SandboxResult:
    library = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    task = {
        "code": code.encode("utf-8", "backslashreplace").decode(),
        "stdin": stdin,
        "memory": memory,
        "seconds": math.ceil(timeout) + 1,
        "readable": [*library, os.path.join(sys.base_prefix, "lib"), *_SYSTEM, *_DEVICES],
    }
    with tempfile.TemporaryDirectory(prefix="marft-sandbox-") as folder:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-X", "utf8", str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env={},
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxError(f"cannot start a process for model-written code: {error}") from error
        try:
            ended, stdout, stderr = _talk(process, json.dumps(task).encode(), timeout, output)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
    if process.returncode == CANNOT_LIMIT:
        raise SandboxError(f"model-written code is not run here: {stderr.decode().strip()}")
    return SandboxResult(
        ended,
        process.returncode,
        stdout.decode("utf-8", "replace"),
        stderr.decode("utf-8", "replace"),
    )


def _talk(
    process: subprocess.Popen[bytes], task: bytes, timeout: float, output: int
) -> tuple[Literal["exit", "timeout", "output"], bytes, bytes]:
    """Give a process its task, and take what it says until it ends or must be ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(task)
    said: dict[int, bytearray] = {
        process.stdout.fileno(): bytearray(),
        process.stderr.fileno(): bytearray(),
    }
    out, err = said.values()
    deadline = time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        for handle in said:
            selector.register(handle, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return "timeout", bytes(out), bytes(err)
            for key, _ in selector.select(left):
                chunk = os.read(key.fd, 65536)
                said[key.fd] += chunk
                if not chunk:
                    selector.unregister(key.fd)
                if len(out) + len(err) > output:
                    return "output", bytes(out[:output]), bytes(err[:output])
    try:
        process.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "timeout", bytes(out), bytes(err)
    return "exit", bytes(out), bytes(err)


_PROBED = (
    *("memory", "processes", "programs", "sockets", "signals", "ptrace", "limits"),
    *("reading", "writing", "deleting", "metadata", "environment"),
)
# Each line that is printed is a limit that held.
_PROBE = """
import ctypes, mmap, os, resource, socket
libc = ctypes.CDLL(None, use_errno=True)

def holds(name, attempt, errors=(OSError,)):
    try:
        attempt()
    except errors:
        print(name)

def fork():
    if os.fork() == 0:
        os._exit(0)

def trace():
    if libc.ptrace(16, PARENT, 0, 0) != 0:
        raise OSError

holds("memory", lambda: mmap.mmap(-1, 10 * 2**30))
holds("processes", fork)
holds("programs", lambda: os.execv("/bin/true", ["true"]))
holds("sockets", socket.socket)
holds("signals", lambda: os.kill(PARENT, 0))
holds("ptrace", trace)
holds("limits", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1)), (OSError, ValueError))
holds("reading", lambda: open(CANARY).close())
holds("writing", lambda: open("own", "w").close())
holds("deleting", lambda: os.unlink(CANARY))
holds("metadata", lambda: os.chmod(CANARY, 0))
if not set(os.environ) - {"LC_CTYPE"}:  # which Python itself sets
    holds("environment", lambda: open("/proc/PARENT/environ").close())
"""
