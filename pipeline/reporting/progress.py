"""How far a run is: a bar on a terminal, plain lines elsewhere. Always on stderr, since stdout is for results.

A run that is a job of a cluster tells it in lines of JSON, from which `Retold` shows the same elsewhere.

`advance` is called from the threads that do the work, so it only adds a number under a lock; one thread of its own
draws the bar a few times a second, and keeps its clock going where a large piece takes long.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from fapm.errors import one_line

if TYPE_CHECKING:
    from fapm.planning.plan import Plan
    from fapm.schedule import Watch

_REDRAW_SECONDS = 0.2
_TELL_SECONDS = 1.0
TELL = "FAPM_PROGRESS"
"""Set to `json` in the environment, it makes a run tell how far it is in lines for `Retold`."""


class Progress:
    """Shows bytes, rate and time left. A context manager: leaving it, also by an error, ends the bar's line.

    Args:
        stream: where to write, stderr if None.
        bar: draw one if that is a terminal.
        detail: −1 for nothing but errors, 1 for what happens too, as it is in the log.
    """

    def __init__(self, stream: TextIO | None = None, bar: bool = True, detail: int = 0):
        self._stream = stream or sys.stderr
        self._detail, bar = detail, bar and detail >= 0
        self._notebook = in_notebook()
        self._is_terminal = bar and (self._stream.isatty() or self._notebook)
        self._tells = os.environ.get(TELL) == "json" and not self._is_terminal
        self._told: dict[str, int] = {}
        self._bar: Any = None
        self._lock = threading.Lock()
        self._not_drawn = 0
        self._ended = threading.Event()
        self._drawer: threading.Thread | None = None
        self._shards: set[str] = set()
        self._done = 0

    @property
    def is_watched(self) -> bool:
        """Whether somebody looks on: a terminal, or a notebook."""
        return self._is_terminal

    @property
    def has_bar(self) -> bool:
        return self._bar is not None

    def watch(self) -> Watch:
        """Watch through which a run tells its progress."""
        from fapm.schedule import Watch

        told = {"note": self.note} if self._detail > 0 else {}
        return Watch(begin=self.begin, expect=self.expect, advance=self.advance, say=self.say, **told)

    def note(self, event: str, **facts: Any) -> None:
        """Say what happens."""
        self.say(" ".join([event, *(f"{name}={value}" for name, value in facts.items() if value != "")]))

    def begin(self, plan: Plan, nbytes: int) -> None:
        """Begin the bar of a run of `nbytes` progress bytes."""
        from fapm.manifest.state import unfinished_shards
        from fapm.recipe import format_bytes

        count, todo = len(plan.shards), unfinished_shards(plan)
        self._shards = {shard.name for shard in plan.shards}
        self._done = count - len(todo)
        paths = ((*recipe.checkpoints, recipe.out) for recipe in (plan.given, plan.recipe))
        for side, given, found in zip((*plan.inputs, "out"), *paths, strict=True):
            if given != found:
                self.say(f"{side}: {given} is {found}")
        for warning in plan.warnings:
            self.say(f"note: {warning}")
        if self._done:
            self.say(f"going on: {self._done} of {count} shards are finished")
        self.say(
            f"{'merging' if plan.lanes else 'pruning'} {sum(1 for _ in plan.tensors())} tensors into {count} shard(s): "
            f"{format_bytes(nbytes)} to read, {format_bytes(sum(plan.shards[i].nbytes for i in todo))} to write"
        )
        self.count(nbytes, _label(self._done, count))

    def count(self, nbytes: int, label: str = "") -> None:
        """Begin to count up to `nbytes`."""
        self._told = {"bytes": 0, "of_bytes": nbytes}
        if self._tells:
            self._tell()
            self._start(self._tell, _TELL_SECONDS)
        if not self._is_terminal:
            return
        tqdm: Any = importlib.import_module("tqdm.auto" if self._notebook else "tqdm").tqdm

        class Bar(tqdm):  # type: ignore[misc]
            monitor_interval = 0  # its own thread would draw at other times than ours

        Bar.set_lock(threading.RLock())
        size = {"dynamic_ncols": True} if _has_size(self._stream) else {"ncols": 79, "nrows": 24}
        self._bar = Bar(total=nbytes, desc=label, unit="B", unit_scale=True, file=self._stream, leave=False, **size)
        self._start(self._draw, _REDRAW_SECONDS)

    def expect(self, nbytes: int) -> None:
        """Lengthen the bar."""
        self._told["of_bytes"] += nbytes
        if self._bar is not None:
            self._bar.total += nbytes

    def advance(self, nbytes: int) -> None:
        """Move the bar on. From any thread."""
        with self._lock:
            self._not_drawn += nbytes

    def say(self, line: str) -> None:
        """Say a line. One that begins with a shard's name says that the shard is finished."""
        if self._detail < 0:
            return
        line = one_line(line)
        if line.split(" ", 1)[0] in self._shards:
            self._done += 1
            if self._bar is not None:
                self.describe(_label(self._done, len(self._shards)))
                return
            line = f"[{self._done}/{len(self._shards)}] {line}"
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            self._stream.write(line + "\n")  # at once: Ctrl-C may come between two writes
            self._stream.flush()

    def describe(self, label: str) -> None:
        """Label before the bar."""
        if self._bar is not None:
            self._bar.set_description_str(label, refresh=False)

    def close(self) -> None:
        """End the bar."""
        self._ended.set()
        if self._drawer:
            self._drawer.join()
        if self._tells and self._told:
            self._tell()
        if self._bar is not None:
            self._draw()
            self._bar.close()
            self._bar = None

    def _start(self, show: Callable[[], None], seconds: float) -> None:
        def show_until_ended() -> None:
            while not self._ended.wait(seconds):
                show()

        self._drawer = threading.Thread(target=show_until_ended, name="progress", daemon=True)
        self._drawer.start()

    def _draw(self) -> None:
        self._bar.n += self._taken()
        self._bar.refresh()

    def _tell(self) -> None:
        before = dict(self._told)
        self._told |= {
            "bytes": self._told["bytes"] + self._taken(),
            "shards": self._done,
            "of_shards": len(self._shards),
        }
        if self._told != before:
            self._stream.write(json.dumps({"progress": self._told}) + "\n")
            self._stream.flush()

    def _taken(self) -> int:
        with self._lock:
            nbytes, self._not_drawn = self._not_drawn, 0
        return nbytes

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def watched(detail: int = 0) -> Iterator[Watch]:
    """The watch of a progress that is shown meanwhile."""
    with Progress(detail=detail) as progress:
        yield progress.watch()


def in_notebook() -> bool:
    """Whether this runs in a notebook, where stderr is no terminal and somebody looks on all the same."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


class Retold:
    """The progress of a run elsewhere, from the lines that it says.

    Attributes:
        result: the facts that it printed at its end, if it has ended well.
    """

    def __init__(self, progress: Progress):
        self._progress = progress
        self._told: dict[str, int] = {}
        self.result: dict[str, Any] | None = None

    def hear(self, line: str) -> None:
        """Take in a line, and show it unless the bar does."""
        try:
            event = json.loads(line) if line.startswith("{") else None
        except ValueError:
            event = None
        if isinstance(event, dict) and "progress" in event:
            self._follow(event["progress"])
        elif isinstance(event, dict) and "totals" in event:
            self.result = event
        elif not (_OF_RAY.match(line) or (_OF_A_SHARD.match(line) and self._progress.has_bar)):
            self._progress.say(line)

    def _follow(self, now: dict[str, int]) -> None:
        if not self._told:
            self._progress.count(now["of_bytes"])
            self._told = {"bytes": 0, "of_bytes": now["of_bytes"]}
        self._progress.expect(now["of_bytes"] - self._told["of_bytes"])
        self._progress.advance(now["bytes"] - self._told["bytes"])
        self._progress.describe(_label(now["shards"], now["of_shards"]))
        self._told = now


_OF_RAY = re.compile(r"Running entrypoint for job |\S+ \S+\s+INFO job_manager\.py")
_OF_A_SHARD = re.compile(r"\[\d+/\d+\] ")


def _label(done: int, shards: int) -> str:
    return f"shard {done}/{shards}"


def _has_size(stream: TextIO) -> bool:
    """Whether a terminal knows its size. Some consoles and containers say 0 × 0, where tqdm would draw nothing."""
    try:
        return all(os.get_terminal_size(stream.fileno()))
    except OSError:
        return False
