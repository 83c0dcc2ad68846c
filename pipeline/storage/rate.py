"""How fast a folder's files can be read: a short look, past the system's cache where that can be."""

from __future__ import annotations

import itertools
import mmap
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

ENOUGH_BYTES = 64 << 20
"""Of files together: of less nothing can be told."""

_PIECE = 4 << 20
_THREADS = 2  # as a worker reads
_SECONDS = 0.25


def read_rate(files: Mapping[str, int]) -> float | None:
    """Bytes a second, by reading for a quarter of a second at places all over some files; None if they are too small.

    Args:
        files: their sizes in bytes.

    Raises:
        OSError: one cannot be read.
    """
    if sum(files.values()) < ENOUGH_BYTES:
        return None
    pieces = [(path, start) for path, size in files.items() for start in range(0, size, _PIECE)]
    step = max(1, len(pieces) // 97)
    order = itertools.chain.from_iterable(pieces[first::step] for first in range(step))  # far apart, each once
    began = time.perf_counter()

    def read() -> int:
        done, buffer = 0, mmap.mmap(-1, _PIECE)
        with buffer:
            while time.perf_counter() - began < _SECONDS and (piece := next(order, None)):
                done += _read(*piece, buffer)
        return done

    with ThreadPoolExecutor(_THREADS) as threads:
        nbytes = sum(future.result() for future in [threads.submit(read) for _ in range(_THREADS)])
    return nbytes / (time.perf_counter() - began)


def _read(path: str, start: int, buffer: mmap.mmap) -> int:
    direct = getattr(os, "O_DIRECT", 0)
    for flags in (os.O_RDONLY | direct, os.O_RDONLY) if direct else (os.O_RDONLY,):
        try:
            fd = os.open(path, flags | os.O_CLOEXEC)
            try:
                return os.preadv(fd, [buffer], start)
            finally:
                os.close(fd)
        except OSError:  # not every file system knows how to read past its cache
            if flags == os.O_RDONLY:
                raise
    raise AssertionError
