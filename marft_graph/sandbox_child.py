"""The inner half of `marft_graph.sandbox`: a script that locks itself in and then runs a program.

Run as `python -I -S sandbox_child.py` with an empty environment and JSON on stdin. Uses the
standard library alone. Whatever cannot be set ends the process before the program is read as code.

No limit here can be lifted again: rlimits are hard and there are no capabilities, Landlock and
seccomp filters stay until the process ends.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import resource
import signal
import struct
import sys
from typing import Any, NoReturn

CANNOT_LIMIT = 97
"""Exit code for: a limit could not be set; stderr says which."""

_ARCH_X86_64 = 0xC000003E
_X32_BIT = 0x40000000
_EPERM, _ENOSYS = 1, 38
_CLONE, _CLONE3, _TGKILL, _PRLIMIT = 56, 435, 234, 302
_CLONE_THREAD = 0x10000
# x86_64 numbers. Processes and programs; sockets; other processes; signals to them; mounts and
# namespaces; kernel interfaces; memory outside the address space; limits; metadata of files, which
# Landlock does not cover; truncation by path, which old versions of it do not.
_DENIED = (
    *(57, 58, 59, 322),  # fork, vfork, execve, execveat
    *(41, 42, 43, 49, 50, 288),  # socket, connect, accept, bind, listen, accept4
    *(101, 310, 311, 312, 434, 438, 440),  # ptrace, process_vm_*, kcmp, pidfd_*, process_madvise
    *(62, 200, 129, 297, 424),  # kill, tkill, rt_*sigqueueinfo, pidfd_send_signal
    *(155, 161, 165, 166, 272, 308, 428, 429, 430, 431, 432, 433, 442),  # mounts, namespaces
    *(134, 135, 163, 167, 168, 169, 170, 171, 175, 176, 246, 313, 320),  # administration
    *(248, 249, 250, 298, 300, 303, 304, 321, 323, 425, 426, 427),  # keys, perf, bpf, io_uring
    *(29, 30, 31, 64, 65, 66, 68, 69, 70, 71, 240, 319, 447),  # System V, queues, memfd
    *(141, 142, 144, 160, 203, 251, 314),  # priorities, schedulers, setrlimit, affinity, ioprio
    *(76, 90, 91, 92, 93, 94, 132, 188, 189, 190, 197, 198, 199, 235),  # truncate, chmod, chown
    *(260, 261, 268, 280, 452, 463, 466),  # the same for files in folders, utime, xattr
)
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_ALL_FILE_RIGHTS = (1 << 13) - 1  # Landlock's first version
_RIGHTS_SINCE = {2: 1 << 13, 3: 1 << 14, 5: 1 << 15}  # refer, truncate, ioctl on devices

_libc = ctypes.CDLL(None, use_errno=True)


def _refuse(what: str) -> NoReturn:
    sys.stderr.write(f"{what}\n")
    sys.stderr.flush()
    os._exit(CANNOT_LIMIT)


def _checked(result: int, what: str) -> int:
    if result < 0:
        _refuse(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _syscall(number: int, *arguments: Any) -> int:
    return int(_libc.syscall(ctypes.c_long(number), *arguments))


def limit_resources(memory: int, seconds: int) -> None:
    """Memory, processor time and open files; nothing may be written to any file."""
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        resource.setrlimit(kind, (most, most))


def drop_privileges() -> None:
    """No capabilities, none to gain, and the end with the parent's."""
    header = struct.pack("=Ii", 0x20080522, 0)
    _checked(_libc.capset(header, bytes(24)), "dropping capabilities")
    _checked(_libc.prctl(38, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    _checked(_libc.prctl(4, 0, 0, 0, 0), "PR_SET_DUMPABLE")
    _checked(_libc.prctl(1, signal.SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")


def restrict_files(readable: list[str]) -> None:
    """Landlock: the given paths can be read, everything else cannot be opened or changed."""
    version = _checked(_syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint(1)), "Landlock")
    rights = _ALL_FILE_RIGHTS
    for since, right in _RIGHTS_SINCE.items():
        rights |= right if version >= since else 0
    attributes = struct.pack("=Q", rights)
    ruleset = _checked(
        _syscall(444, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0)),
        "making a Landlock ruleset",
    )
    for path in readable:
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        allowed = _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0)
        rule = struct.pack("=Qi", allowed, handle)
        _checked(
            _syscall(445, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint(0)),
            f"a Landlock rule for {path}",
        )
        os.close(handle)
    _checked(_syscall(446, ctypes.c_int(ruleset), ctypes.c_uint(0)), "Landlock")
    os.close(ruleset)


def restrict_calls() -> None:
    """seccomp: no new process, program, socket, signal to others, or anything that reaches out."""
    load, jump_equal, jump_any_bit, jump_at_least, answer = 0x20, 0x15, 0x45, 0x35, 0x06
    allow, kill, error = 0x7FFF0000, 0x80000000, 0x00050000
    first, third = 16, 32  # offsets of arguments in seccomp_data; each has two halves

    def step(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("=HBBI", code, yes, no, k)

    program = [
        step(load, 4),
        step(jump_equal, _ARCH_X86_64, 1, 0),
        step(answer, kill),
        step(load, 0),
        step(jump_at_least, _X32_BIT, 0, 1),
        step(answer, error | _EPERM),
        step(jump_equal, _CLONE3, 0, 1),
        step(answer, error | _ENOSYS),  # the C library then uses clone, which can be judged
        step(jump_equal, _CLONE, 0, 4),
        step(load, first),
        step(jump_any_bit, _CLONE_THREAD, 0, 1),
        step(answer, allow),
        step(answer, error | _EPERM),
        step(jump_equal, _TGKILL, 0, 4),
        step(load, first),
        step(jump_equal, os.getpid(), 0, 1),
        step(answer, allow),
        step(answer, error | _EPERM),
        step(jump_equal, _PRLIMIT, 0, 6),
        step(load, third),
        step(jump_equal, 0, 0, 3),
        step(load, third + 4),
        step(jump_equal, 0, 0, 1),
        step(answer, allow),  # no new limit is given: it only asks
        step(answer, error | _EPERM),
    ]
    for number in _DENIED:
        program += [step(jump_equal, number, 0, 1), step(answer, error | _EPERM)]
    program.append(step(answer, allow))
    code = ctypes.create_string_buffer(b"".join(program))
    filter_program = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    _checked(_libc.prctl(22, 2, filter_program, 0, 0), "the seccomp filter")


def main() -> None:
    """Read the task from stdin, set every limit, run the program."""
    task = json.loads(sys.stdin.buffer.read())
    try:
        program = compile(task["code"], "<program>", "exec")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(1)
    sys.stdin = io.StringIO(task["stdin"])
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    try:
        limit_resources(task["memory"], task["seconds"])
        drop_privileges()
        restrict_files(task["readable"])
        restrict_calls()
    except (OSError, ValueError, AttributeError) as error:
        _refuse(f"{type(error).__name__}: {error}")
    del task
    exec(program, {"__name__": "__main__", "__builtins__": __builtins__})


if __name__ == "__main__":
    main()
