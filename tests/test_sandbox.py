"""Programs that a hostile model might write: each contained, and none run where it could not be."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from marft_graph import sandbox
from marft_graph.errors import SandboxError
from marft_graph.sandbox import require_sandbox, run_python

try:
    require_sandbox()
    CANNOT = ""
except SandboxError as error:
    CANNOT = str(error)
contained = pytest.mark.skipif(bool(CANNOT), reason=CANNOT or "-")


@contained
def test_a_program_reads_computes_and_prints() -> None:
    result = run_python("import math\nprint(math.isqrt(int(input())))", stdin="49\n")
    assert (result.ok, result.stdout, result.stderr) == (True, "7\n", "")


@contained
@pytest.mark.parametrize("code", ["1 / 0", "def (", "raise SystemExit(3)", "x = '\0'", "\ud800"])
def test_a_program_that_fails_says_why(code: str) -> None:
    result = run_python(code)
    assert not result.ok
    assert result.ended == "exit"
    assert result.exit_code in (1, 3)


@contained
def test_a_fork_bomb_starts_no_process() -> None:
    bomb = """
import os, subprocess, sys, multiprocessing
for start in (
    os.fork,
    lambda: subprocess.run([sys.executable, "-c", "1"]),
    lambda: os.posix_spawn("/bin/true", ["true"], {}),
    lambda: multiprocessing.get_context("fork").Process(target=print).start(),
):
    try:
        start()
        print("started")
    except OSError as error:
        print(type(error).__name__)
while True:
    os.fork()
"""
    result = run_python(bomb)
    assert "started" not in result.stdout
    assert result.stdout.count("PermissionError") == 4
    assert result.exit_code == 1


@contained
def test_a_bomb_of_threads_runs_into_the_memory_limit() -> None:
    bomb = """
import threading, time
while True:
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
"""
    started = time.monotonic()
    result = run_python(bomb, timeout=10)
    assert not result.ok
    assert time.monotonic() - started < 60


@contained
@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(600)",
        "import threading; threading.Event().wait()",
    ],
)
def test_an_infinite_loop_ends_at_its_deadline(code: str) -> None:
    started = time.monotonic()
    result = run_python("print('begun', flush=True)\n" + code, timeout=1.5)
    assert result.ended == "timeout"
    assert not result.ok
    assert time.monotonic() - started < 60


@contained
@pytest.mark.parametrize(
    "code", ["x = bytearray(10 * 2**30)", "x = []\nwhile True: x.append('a' * 10**6 + str(len(x)))"]
)
def test_ten_gigabytes_are_not_to_be_had(code: str) -> None:
    result = run_python(code, timeout=30)
    assert result.exit_code != 0
    assert "MemoryError" in result.stderr


@contained
def test_files_outside_can_neither_be_read_nor_deleted_nor_changed(tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("precious")
    mode = own.stat().st_mode
    attempts = f"""
import os, shutil
path, folder = {str(own)!r}, {str(tmp_path)!r}
for attempt in (
    lambda: os.remove(path),
    lambda: shutil.rmtree(folder),
    lambda: open(path).read(),
    lambda: open(path, "w"),
    lambda: os.truncate(path, 0),
    lambda: os.rename(path, path + "2"),
    lambda: os.chmod(path, 0),
    lambda: os.chown(path, 1, 1),
    lambda: os.utime(path, (0, 0)),
    lambda: os.setxattr(path, "user.x", b"1"),
    lambda: os.symlink(path, "link"),
    lambda: os.link(path, "link"),
    lambda: os.mkdir("folder"),
    lambda: open("file", "w"),
    lambda: os.listdir("/"),
    lambda: os.listdir(folder),
    lambda: open("/etc/passwd").read(),
):
    try:
        attempt()
        print("did it")
    except OSError:
        print("denied")
"""
    result = run_python(attempts)
    assert result.stdout.split("\n")[:-1] == ["denied"] * 17, result
    assert own.read_text() == "precious"
    assert own.stat().st_mode == mode


@contained
def test_there_is_no_socket() -> None:
    code = """
import socket, urllib.request
for kind in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
    try:
        socket.socket(kind)
        print("a socket")
    except PermissionError:
        print("denied")
try:
    urllib.request.urlopen("http://127.0.0.1:9", timeout=1)
except OSError as error:
    print("denied", error)
"""
    result = run_python(code)
    assert result.stdout.count("denied") == 4, result


@contained
def test_the_parents_environment_and_memory_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_API_KEY", "canary-9d1e")
    code = """
import ctypes, os
print(dict(os.environ))
for path in ("environ", "mem", "maps", "cmdline"):
    for process in (os.getppid(), "self"):
        try:
            open(f"/proc/{process}/{path}", "rb").read(10)
            print("read it")
        except OSError:
            pass
libc = ctypes.CDLL(None, use_errno=True)
print("attached" if libc.ptrace(16, os.getppid(), 0, 0) == 0 else "no trace")
for signal in (0, 9, 15):
    try:
        os.kill(os.getppid(), signal)
        print("killed it")
    except PermissionError:
        pass
"""
    result = run_python(code)
    assert result.ok, result
    assert "canary" not in result.stdout + result.stderr
    assert "read it" not in result.stdout
    assert "killed it" not in result.stdout
    assert "no trace" in result.stdout


@contained
def test_limits_cannot_be_lifted_from_inside() -> None:
    code = """
import resource
for limit in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_CPU):
    for most in (resource.RLIM_INFINITY, 10**12):
        try:
            resource.setrlimit(limit, (most, most))
            print("lifted")
        except (OSError, ValueError):
            print("denied")
print(resource.getrlimit(resource.RLIMIT_FSIZE))
"""
    result = run_python(code)
    assert result.stdout == "denied\n" * 6 + "(0, 0)\n", result


@contained
def test_a_program_that_writes_without_end_is_ended() -> None:
    result = run_python("while True: print('x' * 10**6)", output=10_000, timeout=30)
    assert result.ended == "output"
    assert len(result.stdout) == 10_000


@contained
def test_what_it_writes_may_be_anything() -> None:
    code = r"import sys; sys.stdout.buffer.write(b'\xff\x1b[2J\0'); sys.stdout.flush()"
    assert run_python(code).stdout == "\ufffd\x1b[2J\0"


@contained
def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    handles = len(os.listdir("/proc/self/fd"))
    run_python("import time; time.sleep(60)", timeout=0.5)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == handles


def refused(monkeypatch: pytest.MonkeyPatch, match: str) -> None:
    require_sandbox.cache_clear()
    ran: list[Any] = []
    with pytest.raises(SandboxError, match=match):
        run_python("print('ran')")
    assert ran == []
    monkeypatch.undo()
    require_sandbox.cache_clear()


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [(sys, "platform", "darwin"), (platform, "machine", lambda: "riscv64")],
)
def test_elsewhere_it_refuses_to_run_anything(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, value: Any
) -> None:
    monkeypatch.setattr(owner, name, value)
    refused(monkeypatch, "on Linux and x86_64 only")


@contained
@pytest.mark.parametrize(
    ("missing", "limit"),
    [
        ("restrict_files(task", "reading"),
        ("restrict_calls()", "processes"),
        ("limit_resources(task", "memory"),
    ],
)
def test_a_limit_that_does_not_hold_is_found_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str, limit: str
) -> None:
    source = sandbox._CHILD.read_text()
    lines = [line for line in source.splitlines() if not line.strip().startswith(missing)]
    assert len(lines) == len(source.splitlines()) - 1
    child = tmp_path / "child.py"
    child.write_text("\n".join(lines))
    monkeypatch.setattr(sandbox, "_CHILD", child)
    refused(monkeypatch, f"no limit on .*{limit}|the sandbox does not work here")


@contained
def test_a_limit_that_cannot_be_set_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = sandbox._CHILD.read_text()
    child = tmp_path / "child.py"
    child.write_text(source.replace("_syscall(444, None", "_syscall(9999, None"))
    monkeypatch.setattr(sandbox, "_CHILD", child)
    refused(monkeypatch, "Landlock: Function not implemented")


@contained
def test_it_works_without_privileges(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("these tests have none anyway")
    drop = "import ctypes; assert ctypes.CDLL(None).capset("
    drop += "__import__('struct').pack('=Ii', 0x20080522, 0), bytes(24)) == 0\n"
    code = drop + "from marft_graph.sandbox import run_python; print(run_python('print(1)').stdout)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout.strip() == "1", done.stderr


@pytest.mark.parametrize("wrong", [{"timeout": 0}, {"memory": 1}, {"output": 0}])
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        run_python("1", **wrong)
