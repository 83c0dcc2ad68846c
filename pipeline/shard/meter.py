"""Meters of a step: its progress, and the time and bytes that it takes."""

from __future__ import annotations

import time
from collections.abc import Callable

from fapm.shard.reading import SectionReader
from fapm.shard.task import Done, Task


class StepProgress:
    """Tells of each byte once, however often a step begins again."""

    def __init__(self, tell: Callable[[int], None]):
        self._tell = tell
        self._told = self._progress = 0

    def begin(self) -> None:
        self._told = 0

    def again(self) -> None:
        self._progress = 0

    def __call__(self, nbytes: int) -> None:
        self._progress += nbytes
        if self._progress > self._told:
            self._tell(self._progress - self._told)
            self._told = self._progress


class Meter:
    """Meter of a step: time and bytes, from now on."""

    def __init__(self, reader: SectionReader):
        self._reader = reader
        self._began, self._cpu = time.perf_counter(), time.thread_time()
        self._read, self._reading = reader.bytes_read, reader.seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @property
    def read_bytes(self) -> int:
        return self._reader.bytes_read - self._read

    def done(self, task: Task, progress: int, written: int = 0, writing: float = 0.0) -> Done:
        reading, computing = self._reader.seconds - self._reading, time.thread_time() - self._cpu
        return Done(task.shard.index, progress, self.read_bytes, written, self.seconds, reading, computing, writing)
