"""Runs a command, and ends with it whatever it has left behind: also what has a session of its own.

python -I supervise.py FD COMMAND...

FD is a pipe that whoever asked holds open: when it is closed, because the time is up or that process has died, the
command ends too. A program of its own that knows nothing of the rest.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_SECONDS = 10.0  # until what cannot be ended is given up


def main() -> None:
    holder, command = int(sys.argv[1]), sys.argv[2:]
    libc = ctypes.CDLL(None)
    if sys.platform == "linux":
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans of what it starts become its own children

    def end_with_me() -> None:
        if sys.platform == "linux":
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    ended, wake = os.pipe()
    for end in (ended, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=end_with_me)
    except FileNotFoundError:
        sys.exit(f"there is no program {command[0]}")
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")
    try:
        while process.poll() is None:
            ready, _, _ = select.select([holder, ended], [], [])
            if holder in ready:
                break
            with contextlib.suppress(BlockingIOError):
                os.read(ended, 4096)
        code = process.poll()
    finally:
        _end_all(process.pid)
    if code is not None and code < 0:  # as it ended
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    os._exit(1 if code is None else code)


def _end_all(first: int) -> None:
    """Kill the command and all that descends from it; those that lose their parent meanwhile come here."""
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until:
        for pid in _descendants(os.getpid()) or [first]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def _descendants(of: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if name.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found: list[int] = []
    waiting = [of]
    while waiting:
        mine = children.get(waiting.pop(), [])
        found += mine
        waiting += mine
    return found


if __name__ == "__main__":
    main()
