"""A folder of files, wherever it is: what readers and writers ask of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np


@dataclass(frozen=True, slots=True)
class FileStat:
    """Size in bytes, and what is another thing after every change of the file: `mtime_ns`, nanoseconds since 1970, or a
    store's `etag`; empty where neither is known.

    A time of change can be set back. So on a file system of this machine there are also `ctime_ns`, which cannot, and
    `inode`; they say something only as long as `disk` is the same.
    """

    size: int
    version: dict[str, Any]


_OF_A_DISK = ("ctime_ns", "inode")


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """By what a file is another than it was: `size`, `header`, or a part of its version."""
    same_disk = "disk" in then and then["disk"] == now.get("disk")
    keys = [key for key in now if key != "disk" and (key not in _OF_A_DISK or (same_disk and key in then))]
    return [key for key in keys if then.get(key) != now[key]]


class Reader(Protocol):
    """An open file, read by ranges, from any thread."""

    size: int

    def read_into(self, offset: int, target: np.ndarray) -> None:
        """Fill `target` (contiguous uint8) with the bytes at `offset`."""
        ...

    def read_rows(self, offsets: Sequence[int], rows: np.ndarray) -> None:
        """Fill each row of `rows` (n, length) with the bytes at its offset; for many short reads."""
        ...

    def read(self, offset: int, length: int) -> bytes: ...


class Writer(Protocol):
    """A file that appears when it is published, whole. What is written to it comes in order."""

    def write(self, offset: int, data: np.ndarray | bytes) -> None:
        """Add to it; `data` may be changed as soon as this returns."""
        ...

    def publish(self) -> None:
        """Make the file durable and let it appear under its name, in one step."""
        ...

    def discard(self) -> None: ...


class Store(Protocol):
    """A folder of files with plain relative names (`a.json`, `sub/b.txt`), read and written whole or by ranges.

    Attributes:
        address: as the user gave it.
        reads_at_once: requests that are worth having under way at the same time.
        writing_bytes: memory that a file takes while it is written.

    Raises:
        UserError, PassingError: from every method, where it cannot be done.
    """

    address: str
    reads_at_once: int
    writing_bytes: int

    def at(self, name: str) -> str:
        """The address of a file."""
        ...

    def absolute(self) -> Store:
        """The same for processes with another working directory."""
        ...

    def exists(self) -> bool: ...

    def is_empty(self) -> bool:
        """Whether there is nothing in it, not even something hidden, or it is not there."""
        ...

    def is_file(self) -> bool:
        """Whether its address is that of a file, not of a folder."""
        ...

    def leads_out(self, name: str) -> bool:
        """Whether a file is a link to one that lies elsewhere, and not in the Hub's cache of which it is a part."""
        ...

    def links(self) -> list[str]:
        """The links in it, at any depth; hidden ones, and what lies in hidden folders, are left out."""
        ...

    def overlaps(self, other: Store) -> str:
        """`same` if the other is this folder, `holds` if it lies in it, `inside` if this lies in it, else nothing."""
        ...

    def files(self, under: str = "") -> dict[str, FileStat]:
        """Every file below, by name; hidden files and folders are left out."""
        ...

    def folders(self) -> list[str]:
        """The names of the folders in it; hidden ones are left out."""
        ...

    def has(self, name: str) -> bool: ...

    def has_folder(self, name: str) -> bool: ...

    def size(self, name: str) -> int: ...

    @property
    def local_path(self) -> Path | None:
        """Where the folder lies on this machine; None where it does not."""
        ...

    def is_here(self, name: str) -> bool:
        """Whether a file is read from this machine, and not over a network."""
        ...

    def changed(self, name: str) -> float:
        """When a file was written last, by the clock of where it lies, in seconds since 1970."""
        ...

    def reader(self, name: str) -> Reader:
        """The file, opened once and kept open until `close`."""
        ...

    def close(self) -> None: ...

    def read(self, name: str) -> bytes: ...

    def write(self, name: str, data: bytes) -> None:
        """Write a small file in one step."""
        ...

    def write_private(self, name: str, data: bytes) -> bool:
        """Write one that only its owner may read; whether files can be that here. Where not, nothing is written."""
        ...

    def append(self, name: str, data: bytes, now: bool = False) -> None:
        """Add to the end of a small file, or begin it.

        Args:
            now: it must not be lost with this process, as it may for some seconds where files cannot be added to.
        """
        ...

    def create(self, name: str, size: int) -> Writer:
        """Begin a file of `size` bytes that appears under its name when it is published."""
        ...

    def remove(self, name: str) -> None: ...

    def remove_folder(self, name: str) -> None:
        """Remove a folder, or a file, with all that is in it."""
        ...

    def free_bytes(self) -> int | None:
        """Bytes that there is room for; None where that is not limited."""
        ...


Item = TypeVar("Item")
Answer = TypeVar("Answer")


def overlapped(ask: Callable[[Item], Answer], items: Iterable[Item], at_once: int) -> Iterator[Answer]:
    """Answers of `ask` for each item, in their order; so many are asked for at once, and no more are held."""
    waiting: deque[Future[Answer]] = deque()
    with ThreadPoolExecutor(at_once, thread_name_prefix="ask") as threads:
        try:
            for item in items:
                if len(waiting) == at_once:
                    yield waiting.popleft().result()
                waiting.append(threads.submit(ask, item))
            while waiting:
                yield waiting.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)
