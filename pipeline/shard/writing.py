"""Writing: a shard's bytes, in order, through a few buffers that a thread hashes and writes behind the arithmetic."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import xxhash

from fapm.storage.store import Writer

BUFFER_BYTES = 8 << 20
BUFFERS = 3


class AnySink(Protocol):
    """Taker of a shard's bytes in order; what each of its methods does says `Sink`."""

    @property
    def seconds(self) -> float: ...

    def reserve(self, nbytes: int, align: int = 1) -> np.ndarray: ...

    def filled_from(self, name: str, start: int, base: np.ndarray) -> None: ...

    def append(self, data: np.ndarray | bytes) -> None: ...

    def finish(self) -> str: ...

    def abandon(self) -> None: ...


class Sink:
    """Takes a file's bytes in order.

    `reserve` lends the next bytes to be filled in place. Errors of the writing thread are raised by the next call.
    `seconds` is how long that thread has hashed and written.

    Args:
        size: of the file.
        buffers: uint8 arrays of one size, BUFFER_BYTES or more.
        filled: asked whenever a buffer goes to the writing thread, which calls the answer: it returns when all that
            was lent until then has been filled.
    """

    def __init__(
        self,
        writer: Writer,
        size: int,
        buffers: Sequence[np.ndarray] = (),
        filled: Callable[[], Callable[[], None]] = lambda: already_done,
    ):
        self._writer = writer
        self._size = size
        self._hash = xxhash.xxh3_128()
        self._free: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        for buffer in buffers or [np.empty(BUFFER_BYTES, np.uint8) for _ in range(BUFFERS)]:
            self._free.put(buffer)
            self._buffer_bytes = buffer.size
        self._filled = filled
        self._full: queue.SimpleQueue[tuple[np.ndarray, int, Callable[[], None]] | None] = queue.SimpleQueue()
        self._current: np.ndarray | None = None
        self._used = 0
        self._position = 0
        self._error: BaseException | None = None
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._write, name="write", daemon=True)
        self._thread.start()

    def reserve(self, nbytes: int, align: int = 1) -> np.ndarray:
        """The next `nbytes` (at most a buffer's) of the file, to be filled before the next call."""
        if self._current is not None and (self._used + nbytes > self._buffer_bytes or self._used % align):
            self._flush()
        if self._current is None:
            self._current = self._free.get()
            self._used = 0
        lent = self._current[self._used : self._used + nbytes]
        self._used += nbytes
        return lent

    def filled_from(self, name: str, start: int, base: np.ndarray) -> None:
        """Tell that what was lent last is filled, with elements of a tensor from `start` on; base's are at hand."""

    def append(self, data: np.ndarray | bytes) -> None:
        """Copy bytes to the end."""
        view = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
        for start in range(0, view.size, self._buffer_bytes):
            part = view[start : start + self._buffer_bytes]
            self.reserve(part.size)[:] = part

    def finish(self) -> str:
        """Wait until all is written; returns the xxh3-128 of the file in hexadecimal."""
        self._flush()
        self._full.put(None)
        self._thread.join()
        if self._error:
            raise self._error
        # A tensor forgotten in a preallocated file would read as zeros: every byte is accounted for.
        assert self._position == self._size, (self._position, self._size)
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Stop without finishing; the file is discarded."""
        self._full.put(None)
        self._thread.join()
        self._writer.discard()

    def _flush(self) -> None:
        if self._error:
            raise self._error
        if self._current is not None:
            self._full.put((self._current, self._used, self._filled()))
            self._current = None

    def _write(self) -> None:
        while item := self._full.get():
            buffer, used, wait = item
            began = time.perf_counter()
            if self._error is None:
                try:
                    wait()
                    began = time.perf_counter()
                    self._hash.update(buffer[:used].data)
                    self._writer.write(self._position, buffer[:used])
                    self._position += used
                except BaseException as error:  # raised again by the thread that computes
                    self._error = error
            self.seconds += time.perf_counter() - began
            self._free.put(buffer)


class Comparing(Writer, Protocol):
    """A writer that compares what it gets with base."""

    def know(self, name: str, start: int, base: np.ndarray) -> None:
        """That the bytes of base's elements of a tensor from `start` on are in memory, until this is called again."""
        ...


class Direct:
    """The same without a thread and without buffers between, for a writer that computes more than it writes: what is
    filled goes there while it is still in the processor's cache. It has no checksum of the file.
    """

    seconds = 0.0

    def __init__(self, writer: Comparing, size: int):
        self._writer, self._size, self._position = writer, size, 0
        self._buffer = np.empty(0, np.uint8)
        self._lent: np.ndarray | None = None

    def reserve(self, nbytes: int, align: int = 1) -> np.ndarray:
        self._flush()
        if self._buffer.size < nbytes:
            self._buffer = np.empty(nbytes, np.uint8)
        self._lent = self._buffer[:nbytes]
        return self._lent

    def filled_from(self, name: str, start: int, base: np.ndarray) -> None:
        self._writer.know(name, start, base)
        self._flush()
        self._writer.know("", 0, base[:0])

    def append(self, data: np.ndarray | bytes) -> None:
        self._flush()
        self._write(np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data)

    def finish(self) -> str:
        self._flush()
        assert self._position == self._size, (self._position, self._size)
        return ""

    def abandon(self) -> None:
        self._writer.discard()

    def _flush(self) -> None:
        lent, self._lent = self._lent, None
        if lent is not None:
            self._write(lent)

    def _write(self, data: np.ndarray) -> None:
        self._writer.write(self._position, data)
        self._position += data.size


def already_done() -> None:
    """Nothing to wait for."""
