"""Bytes in and out of folders: ranged reads into the caller's buffer, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pipeline.errors import PassingError, UserError
from pipeline.storage.store import FileStat, Store

TEMPORARY = "fapm/tmp"
"""In the output folder, so that publishing is a rename within one file system."""


@contextlib.contextmanager
def plain_errors(path: Path | str) -> Iterator[None]:
    """Turn what an operating system says of `path` into a sentence for the user."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PassingError(
                f"no space left while writing {path}; free some and run the same command again: it goes on from here"
            ) from None
        kind = PassingError if error.errno in _PASSING else UserError
        raise kind(f"{path}: {error.strerror or error}") from None


# What a file system over a network says while it is away, or a process that has too many files open.
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENETDOWN, errno.ENETUNREACH, errno.EMFILE}


class Reader:
    """An open file, read by ranges. Safe to use from several threads.

    Raises:
        UserError: the file cannot be opened, or ends before a range that was asked for.
    """

    def __init__(self, path: Path):
        self.path = path
        with plain_errors(path):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.size = os.fstat(self._fd).st_size

    def read_into(self, offset: int, target: np.ndarray) -> None:
        """Fill `target` (contiguous uint8) with the bytes at `offset`."""
        view = target.data
        while view.nbytes:
            with plain_errors(self.path):
                got = os.preadv(self._fd, [view], offset)
            if not got:
                raise UserError(f"{self.path}: the file ends at byte {offset}; it was cut short while in use")
            view = view[got:]
            offset += got

    def read_rows(self, offsets: Sequence[int], rows: np.ndarray) -> None:
        """Fill each row of `rows` (n, length) with the bytes at its offset; for many short reads."""
        with plain_errors(self.path):
            for offset, row in zip(offsets, rows, strict=True):
                if os.preadv(self._fd, [row.data], offset) < row.size:
                    self.read_into(offset, row)

    def read(self, offset: int, length: int) -> bytes:
        target = np.empty(length, np.uint8)
        self.read_into(offset, target)
        return target.tobytes()

    def close(self) -> None:
        os.close(self._fd)


class Writer:
    """A file being written under a temporary name, in any order of ranges."""

    def __init__(self, folder: Folder, name: str, size: int):
        self.path = folder.path / name
        self._folder = folder
        self._temporary = folder.new_temporary()
        with folder.changing(self._temporary):
            self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with plain_errors(self.path):
                if size:
                    os.posix_fallocate(self._fd, 0, size)  # a full disk is known now, not after an hour
        except UserError:
            self.discard()
            raise

    def write(self, offset: int, data: np.ndarray | bytes) -> None:
        view = memoryview(data) if isinstance(data, bytes) else data.data
        with plain_errors(self.path):
            while view.nbytes:
                done = os.pwrite(self._fd, view, offset)
                view = view[done:]
                offset += done

    def publish(self) -> None:
        """Make the file durable, then let it appear under its name, in one step."""
        with self._folder.changing(self.path):
            os.fsync(self._fd)
            self._close()
            try:
                os.replace(self._temporary, self.path)
            except FileNotFoundError:
                if not self._temporary.exists():
                    raise
                self.path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(self._temporary, self.path)
            _sync_folder(self.path.parent)

    def _close(self) -> None:
        fd, self._fd = self._fd, -1  # once: the number may soon be another file's
        if fd >= 0:
            os.close(fd)

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self._close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Folder:
    """A `Store` on this machine, or on a file system that is mounted here.

    Nothing outside the folder is reachable through a name.

    Args:
        token: of the hold under which it is changed (`storage.hold`); without one nobody else may change it.
    """

    reads_at_once = 2
    writing_bytes = 0

    def __init__(self, path: str | Path, token: str = ""):
        self.path = Path(path)
        self.address = str(path)
        self._token = token
        self._readers: dict[str, Reader] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Folder], tuple[Path, str]]:
        return Folder, (self.path, self._token)  # open files stay behind

    def absolute(self) -> Folder:
        """The same for processes with another working directory."""
        return Folder(self.path.absolute(), self._token)

    def new_temporary(self) -> Path:
        """A new path for what is not, or no more, in its place. The hold's own folder is never made again here."""
        if not self._token:
            with plain_errors(self.path):
                (self.path / TEMPORARY).mkdir(parents=True, exist_ok=True)
        return self.path / TEMPORARY / self._token / uuid.uuid4().hex

    @contextlib.contextmanager
    def changing(self, path: Path) -> Iterator[None]:
        """A change of `path` in this folder, which fails if the folder is not held any more.

        Raises:
            PassingError: another run has taken it over.
        """
        with plain_errors(path):
            try:
                yield
            except FileNotFoundError:
                if not self._token or (self.path / TEMPORARY / self._token).exists():
                    raise
                raise PassingError(
                    f"--out {self.path} was taken over by another run or removed while this one was at work; "
                    "this one has ended without changing anything since"
                ) from None

    def _at(self, name: str) -> Path:
        parts = name.split("/")
        if name.startswith("/") or "\0" in name or any(part in ("", ".", "..") for part in parts):
            raise UserError(f"{self.path}: refused the file name {name!r}, which leads out of the folder")
        return self.path / name

    def at(self, name: str) -> str:
        return str(self.path / name)

    def exists(self) -> bool:
        return self.path.is_dir()

    def is_empty(self) -> bool:
        return not self.path.is_dir() or not any(self.path.iterdir())

    def is_file(self) -> bool:
        return self.path.exists() and not self.path.is_dir()

    def leads_out(self, name: str) -> bool:
        root, file = self.path.resolve(), self._at(name).resolve()
        blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
        return root not in file.parents and blobs not in file.parents

    def overlaps(self, other: Store) -> str:
        if not isinstance(other, Folder):
            return ""
        here, there = self.path.resolve(), other.path.resolve()
        return "same" if here == there else "holds" if here in there.parents else ""

    def folders(self) -> list[str]:
        with plain_errors(self.path):
            return [path.name for path in self.path.iterdir() if path.is_dir() and not path.name.startswith(".")]

    def files(self, under: str = "") -> dict[str, FileStat]:
        found = {}
        for folder, folders, names in os.walk(self.path / under):
            folders[:] = sorted(n for n in folders if not n.startswith("."))
            for name in sorted(names):
                path = Path(folder, name)
                if not name.startswith(".") and path.is_file():
                    stat = path.stat()
                    relative = path.relative_to(self.path).as_posix()
                    found[relative] = FileStat(stat.st_size, {"mtime_ns": stat.st_mtime_ns})
        return found

    def has(self, name: str) -> bool:
        return self._at(name).is_file()

    def has_folder(self, name: str) -> bool:
        return self._at(name).is_dir()

    def size(self, name: str) -> int:
        return self._at(name).stat().st_size

    def is_here(self, name: str) -> bool:
        return True

    def changed(self, name: str) -> float:
        return self._at(name).stat().st_mtime

    def reader(self, name: str) -> Reader:
        with self._lock:
            if name not in self._readers:
                self._readers[name] = Reader(self._at(name))
            return self._readers[name]

    def close(self) -> None:
        with self._lock:
            for reader in self._readers.values():
                reader.close()
            self._readers.clear()

    def read(self, name: str) -> bytes:
        with plain_errors(self.path / name):
            return self._at(name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        self._at(name)
        writer = Writer(self, name, 0)
        try:
            writer.write(0, data)
            writer.publish()
        except BaseException:
            writer.discard()
            raise

    def append(self, name: str, data: bytes, now: bool = False) -> None:
        path = self._at(name)
        with plain_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab", buffering=0) as file:
                file.write(data)

    def create(self, name: str, size: int) -> Writer:
        self._at(name)
        return Writer(self, name, size)

    def remove(self, name: str) -> None:
        away = self._put_away(self._at(name))
        with plain_errors(self.path / name):
            away.unlink(missing_ok=True)

    def remove_folder(self, name: str) -> None:
        away = self._put_away(self._at(name))
        with plain_errors(self.path / name):
            if away.is_dir():
                shutil.rmtree(away)
            else:
                away.unlink(missing_ok=True)

    def _put_away(self, path: Path) -> Path:
        """Where something is that is about to be removed: out of sight at once, if the folder is still held."""
        if not self._token:
            return path
        away = self.new_temporary()
        with self.changing(path):
            try:
                os.replace(path, away)
            except FileNotFoundError:
                if path.exists() or not away.parent.exists():
                    raise  # it was there, but the hold's folder is not
        return away

    def free_bytes(self) -> int:
        """What the file system under the folder, or its nearest parent that exists, has left."""
        path = self.path.absolute()
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free
