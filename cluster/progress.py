"""How far a run is: a bar on a terminal, plain lines elsewhere. Always on stderr, since stdout is for results.

`advance` is called from the threads that do the work, so it only adds a number under a lock; one thread of its own
draws the bar a few times a second, and keeps its clock going where a large piece takes long.
"""

from __future__ import annotations

import os
import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from pipeline.plan import Plan
    from pipeline.run import Watch

_REDRAW_SECONDS = 0.2


class Progress:
    """Shows bytes, rate and time left. A context manager: leaving it, also by an error, ends the bar's line.

    Args:
        stream: where to write, stderr if None. The bar is drawn if it is a terminal.
    """

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._bar: Any = None
        self._lock = threading.Lock()
        self._not_drawn = 0
        self._ended = threading.Event()
        self._drawer: threading.Thread | None = None
        self._shards: set[str] = set()
        self._done = 0

    def watch(self) -> Watch:
        """What a run tells its progress to."""
        from pipeline.run import Watch

        return Watch(begin=self.begin, expect=self.expect, advance=self.advance, say=self.say)

    def begin(self, plan: Plan, nbytes: int) -> None:
        """A run begins that will deal with `nbytes` of input."""
        from pipeline.manifest import unfinished_shards
        from pipeline.recipe import PATHS, format_bytes

        count, todo = len(plan.shards), unfinished_shards(plan)
        self._shards = {shard.name for shard in plan.shards}
        self._done = count - len(todo)
        for side in PATHS:
            given, found = getattr(plan.given, side), getattr(plan.recipe, side)
            if given != found:
                self.say(f"{side}: {given} is {found}")
        for oddity in plan.oddities:
            self.say(f"note: {oddity}")
        if self._done:
            self.say(f"going on: {self._done} of {count} shards are finished")
        self.say(
            f"pruning {sum(1 for _ in plan.tensors())} tensors into {count} shard(s): "
            f"{format_bytes(nbytes)} to read, {format_bytes(sum(plan.shards[i].nbytes for i in todo))} to write"
        )
        self.count(nbytes, f"shard {self._done}/{count}")

    def count(self, nbytes: int, label: str = "") -> None:
        """Begin to count up to `nbytes`."""
        if not self._is_terminal:
            return
        from tqdm import tqdm

        class Bar(tqdm):  # type: ignore[type-arg]
            monitor_interval = 0  # its own thread would draw at other times than ours

        Bar.set_lock(threading.RLock())
        size = {"dynamic_ncols": True} if _has_size(self._stream) else {"ncols": 79, "nrows": 24}
        self._bar = Bar(total=nbytes, desc=label, unit="B", unit_scale=True, file=self._stream, leave=False, **size)
        self._drawer = threading.Thread(target=self._draw_until_ended, name="progress", daemon=True)
        self._drawer.start()

    def expect(self, nbytes: int) -> None:
        """So many bytes more will be dealt with than was said."""
        if self._bar is not None:
            self._bar.total += nbytes

    def advance(self, nbytes: int) -> None:
        """So many more bytes have been dealt with. From any thread."""
        with self._lock:
            self._not_drawn += nbytes

    def say(self, line: str) -> None:
        """Say a line. One that begins with a shard's name says that the shard is finished."""
        if line.split(" ", 1)[0] in self._shards:
            self._done += 1
            if self._bar is not None:
                self._bar.set_description_str(f"shard {self._done}/{len(self._shards)}", refresh=False)
                return
            line = f"[{self._done}/{len(self._shards)}] {line}"
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            self._stream.write(line + "\n")  # at once: Ctrl-C may come between two writes
            self._stream.flush()

    def close(self) -> None:
        """End the bar."""
        self._ended.set()
        if self._drawer:
            self._drawer.join()
        if self._bar is not None:
            self._draw()
            self._bar.close()
            self._bar = None

    def _draw_until_ended(self) -> None:
        while not self._ended.wait(_REDRAW_SECONDS):
            self._draw()

    def _draw(self) -> None:
        with self._lock:
            nbytes, self._not_drawn = self._not_drawn, 0
        self._bar.n += nbytes
        self._bar.refresh()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _has_size(stream: TextIO) -> bool:
    """Whether a terminal knows its size. Some consoles and containers say 0 × 0, where tqdm would draw nothing."""
    try:
        return all(os.get_terminal_size(stream.fileno()))
    except OSError:
        return False
