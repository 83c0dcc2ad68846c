"""Programs of ours that look into a stranger's file for the process that wants to know: little memory, no world.

`ask` starts one, and bounds its time and the length of its answer. The program calls `give_up_the_world`, and prints
its answer. It is imported by both, by the programs without anything else of fapm.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

EXIT = 3
"""With which such a program ends when it refuses what it was given; it has said why on stdout."""

# Numbers of the system calls that are refused, and of the one that opens files with the place of its flags.
_MACHINES = {
    "x86_64": (
        0xC000003E, 317, {257: 2, 2: 1},
        (41, 42, 43, 44, 46, 49, 50, 53, 57, 58, 59, 62, 76, 77, 82, 83, 84, 85, 86, 87, 88, 90, 91, 92, 93, 94, 101,
         133, 165, 166, 188, 189, 190, 200, 234, 235, 258, 259, 260, 261, 263, 264, 265, 266, 268, 280, 288, 298, 307,
         310, 311, 316, 319, 321, 322, 425, 426, 427, 437, 452),
    ),
    "aarch64": (
        0xC00000B7, 277, {56: 2},
        (5, 6, 7, 33, 34, 35, 36, 37, 38, 39, 40, 45, 46, 52, 53, 54, 55, 88, 117, 129, 130, 131, 198, 199, 200, 201,
         202, 203, 206, 211, 221, 241, 242, 269, 270, 271, 276, 279, 280, 281, 425, 426, 427, 437, 452),
    ),
}  # fmt: skip
_WRITING = 0x1 | 0x2 | 0x40 | 0x200 | 0x400  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_APPEND


class RefusedError(Exception):
    """No answer, and why not."""


def ask(
    program: str, words: Sequence[str] = (), data: bytes = b"", seconds: float = 180, most_bytes: int = 64 << 20
) -> bytes:
    """Answer of a program beside this module.

    Args:
        data: on its standard input.
        most_bytes: of the answer.

    Raises:
        RefusedError: it takes too long, says too much, or refuses.
    """
    command = [sys.executable, "-I", str(Path(__file__).with_name(program)), *words]
    with tempfile.TemporaryFile() as given:
        given.write(data)
        given.seek(0)
        process = subprocess.Popen(command, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        answer, complaints = _read(process, seconds, most_bytes)
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream
            stream.close()
    if process.returncode == EXIT:
        raise RefusedError(answer.decode(errors="replace")[:300])
    if process.returncode:
        lines = complaints.decode(errors="replace").strip().splitlines()
        raise RefusedError(lines[-1][:200] if lines else f"it ended with {process.returncode}")
    return answer


def _read(process: subprocess.Popen[bytes], seconds: float, most_bytes: int) -> tuple[bytes, bytes]:
    until = time.monotonic() + seconds
    found = {"out": bytearray(), "err": bytearray()}
    with selectors.DefaultSelector() as selector:
        for key, stream in (("out", process.stdout), ("err", process.stderr)):
            assert stream
            selector.register(stream, selectors.EVENT_READ, key)
        while selector.get_map():
            left = until - time.monotonic()
            if left <= 0:
                raise RefusedError(f"it takes longer than {seconds:g} s")
            for event, _ in selector.select(left):
                data = os.read(event.fd, 1 << 16)
                if not data:
                    selector.unregister(event.fileobj)
                found[event.data] += data
            if len(found["out"]) > most_bytes or len(found["err"]) > 1 << 20:
                raise RefusedError("what it describes is more than any description")
    process.wait()
    return bytes(found["out"]), bytes(found["err"])


def limit(memory: int, seconds: int) -> None:
    """From now on this process takes at most so much more memory, and so much of a processor's time."""
    with open("/proc/self/statm", "rb") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


def give_up_the_world() -> None:
    """From now on no file can be opened to write, removed or renamed, no program started, no socket made.

    Raises:
        OSError: the system cannot do that.
    """
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        raise OSError("this system has no seccomp")
    arch, seccomp, opening, refused = _MACHINES[platform.machine()]
    load, equal, set_, answer = 0x20, 0x15, 0x45, 0x06
    no, yes = (answer, 0, 0, 0x00050000 | 1), (answer, 0, 0, 0x7FFF0000)  # EPERM
    program = [(load, 0, 0, 4), (equal, 1, 0, arch), no, (load, 0, 0, 0)]
    program += [(0x35, 0, 1, 0x40000000), no]  # calls of another ABI
    for number in refused:
        program += [(equal, 0, 1, number), no]
    for number, place in opening.items():
        program += [(equal, 0, 4, number), (load, 0, 0, 16 + 8 * place), (set_, 0, 1, _WRITING), no, yes]
    program.append(yes)

    class Step(ctypes.Structure):
        _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.POINTER(Step)))

    steps = (Step * len(program))(*(Step(*step) for step in program))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
        raise OSError(ctypes.get_errno(), "prctl")
    filter_, of_all_threads = 1, 1
    if libc.syscall(seccomp, filter_, of_all_threads, ctypes.byref(Program(len(program), steps))):
        raise OSError(ctypes.get_errno(), "seccomp")


def refuse(why: str) -> None:
    """End the program, saying why."""
    sys.stdout.write(why)
    sys.stdout.flush()
    os._exit(EXIT)
