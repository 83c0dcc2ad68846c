"""How fast this machine is just now, so that no test depends on how busy or how old it is.

Waits and limits are seconds of a quiet machine of 2026, times `patience()`; what must come at once is held by
`at_once` against work that is done in the same moment. No test reads a clock for anything else.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_TURNS = 2_500_000
"""Of a loop that takes 0.1 s on a quiet machine."""
_MARGIN = 4.0


def _work() -> int:
    total = 0
    for i in range(_TURNS):
        total += i & 7
    return total


def pace() -> float:
    """How many times longer this machine takes for the same work than a quiet one, waiting for a turn included."""
    began = time.perf_counter()
    for _ in range(3):
        _work()
    return max(1.0, (time.perf_counter() - began) / 0.3)


_known = {"pace": 1.0, "until": 0.0}


def patience() -> float:
    """What seconds of a quiet machine are multiplied with before something counts as hung; measured once a minute."""
    if time.monotonic() > _known["until"]:
        _known.update(pace=pace(), until=time.monotonic() + 60)
    return _MARGIN * _known["pace"]


def wait_until(true: Callable[[], Any], seconds: float = 60, pause: float = 0.02) -> Any:
    """Wait until something is so, and return it. How patient to be is measured when the time is up."""
    began, limit = time.monotonic(), seconds
    while not (found := true()):
        if time.monotonic() - began > limit:
            extended = seconds * _MARGIN * pace()
            assert limit < extended, f"it did not happen in {limit:.0f} s"
            limit = extended
        time.sleep(pause)
    return found


@contextmanager
def at_once(seconds: float) -> Iterator[None]:
    """Assert that what is inside takes less CPU time than this of a quiet machine, held against a loop run now."""
    began = time.process_time()
    _work()
    unit, began = time.process_time() - began, time.process_time()
    yield
    taken = time.process_time() - began
    assert taken < seconds * unit / 0.1, f"{taken:.2f} s of CPU where the loop of 0.1 s took {unit:.2f} s"


@contextmanager
def soon(seconds: float) -> Iterator[None]:
    """Assert that what is inside, its waits included, does not take many times these seconds of a quiet machine."""
    before, began = pace(), time.monotonic()
    yield
    taken = time.monotonic() - began
    limit = _MARGIN * seconds * max(before, pace())
    assert taken < limit, f"{taken:.1f} s of at most {limit:.1f}"


def cpu_seconds(command: list[str], **how: Any) -> float:
    """What a process takes from its start to its end, its children included."""
    import resource

    def of_children() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    began = of_children()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **how)
    return of_children() - began
