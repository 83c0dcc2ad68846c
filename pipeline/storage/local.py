"""Bytes in and out of folders: ranged reads into the caller's buffer, and files that appear whole or not at all.

A folder may be a stranger's. What is read must lie in it, links included; what is written, renamed or removed is found
from the folder downwards by directory handles that follow no link.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import threading
import uuid
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fapm.errors import PassingError, UserError
from fapm.layout import TEMPORARY
from fapm.storage.store import FileStat, Store

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
_PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
    errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNABORTED, errno.ECONNRESET, errno.EAGAIN, errno.EINTR, errno.EMFILE,
    errno.ENFILE, errno.ENOMEM, errno.ENOLCK, errno.EBUSY,
}  # fmt: skip
# What file systems say that do not know how to do something which is only for safety or speed.
_NOT_KNOWN = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EBADF}


class Reader:
    """An open file, read by ranges. Safe to use from several threads.

    Raises:
        UserError: the file cannot be opened, is none, or ends before a range that was asked for.
    """

    def __init__(self, path: Path):
        self.path = path
        with plain_errors(path):
            # A pipe would wait for who writes into it.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            about = os.fstat(self._fd)
        self.size = about.st_size
        if not stat.S_ISREG(about.st_mode):
            self.close()
            raise UserError(f"{path} is no file")

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


def _stat(path: Path, real: str) -> FileStat:
    """Size and version of a file, which tell it from others; `real` is its folder without links."""
    about = path.stat()
    version: dict[str, Any] = {"mtime_ns": about.st_mtime_ns}
    kind, disk = _disk(about.st_dev, real)
    if disk:
        version |= {"ctime_ns": about.st_ctime_ns, "disk": disk}
        version |= {} if kind == "overlay" else {"inode": about.st_ino}
    return FileStat(about.st_size, version)


# Where times of change and numbers of inodes are the disk's own, and stay with a file. Of file systems over a network
# and of FUSE neither is known, and of overlays the numbers are not.
_DISKS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "tmpfs", "overlay")


@lru_cache(4096)
def _disk(device: int, folder: str) -> tuple[str, str]:
    """The kind of a folder's file system, and what tells it from others where it is a disk of this machine."""
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            mounts = [line.split() for line in file]
        kinds = {os.fsdecode(m[4]).replace("\\040", " "): m[m.index(b"-") + 1].decode() for m in mounts}
        nearest = max((p for p in kinds if p == folder or folder.startswith(f"{p.rstrip('/')}/")), key=len)
        return kinds[nearest], f"{os.statvfs(folder).f_fsid:x}" if kinds[nearest] in _DISKS else ""
    except (OSError, ValueError, IndexError):
        return "", ""


_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@contextlib.contextmanager
def _opened(root: Path, name: str, make: bool = False) -> Iterator[tuple[int, str]]:
    """A handle of the folder in which `name` lies, below `root`, and the last part of the name.

    Args:
        make: folders that are not there.

    Raises:
        UserError: a part of the way is a link.
        OSError: it is not there.
    """
    *folders, last = name.split("/")
    handle = os.open(root, _FOLDER)
    try:
        for i, part in enumerate(folders):
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=handle)
            try:
                inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=handle)
            except OSError:
                if _is_link(part, handle):
                    raise planted(root.joinpath(*folders[: i + 1])) from None
                raise
            os.close(handle)
            handle = inner
        yield handle, last
    finally:
        os.close(handle)


def _is_link(name: str, handle: int) -> bool:
    try:
        return stat.S_ISLNK(os.lstat(name, dir_fd=handle).st_mode)
    except OSError:
        return False


def planted(path: Path | str) -> UserError:
    """Refusal of a link where something is to be written or removed."""
    return UserError(
        f"{path} is a link, and nothing in an output may be one: what is written there would land elsewhere; remove "
        "it, or give another folder"
    )


def _reserve(fd: int, size: int) -> None:
    """Room for a file: that a disk is full is known now, not after an hour."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:  # file systems that take bytes in their order only, as those over object stores
        if error.errno not in _NOT_KNOWN:
            raise


class Writer:
    """A file being written under a temporary name, in any order of ranges."""

    def __init__(self, folder: Folder, name: str, size: int, mode: int = 0o666):
        self.path = folder.path / name
        self._folder, self._name = folder, name
        self._temporary = folder.new_temporary()
        with folder.changing(self.path):
            self._fd = folder.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with plain_errors(self.path):
                if size:
                    _reserve(self._fd, size)
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
                self._folder.rename(self._temporary, self._name)
            except FileNotFoundError:
                if not self._folder.is_there(self._temporary):
                    raise
                self._folder.rename(self._temporary, self._name, make=True)
            self._folder.sync(self._name)

    def _close(self) -> None:
        fd, self._fd = self._fd, -1  # once: the number may soon be another file's
        if fd >= 0:
            os.close(fd)

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self._close()
        with contextlib.suppress(OSError, UserError):
            self._folder.unlink(self._temporary)


class Folder:
    """A `Store` on this machine, or on a file system that is mounted here.

    Nothing outside the folder is reachable through a name.

    Args:
        token: of the lease under which it is changed (`storage.lease`); without one nobody else may change it.
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

    def new_temporary(self) -> str:
        """A new name for what is not, or no more, in its place. The lease's own folder is never made again here."""
        if not self._token:
            with plain_errors(self.path):
                self.make_folder(TEMPORARY)
            return f"{TEMPORARY}/{uuid.uuid4().hex}"
        return f"{TEMPORARY}/{self._token}/{uuid.uuid4().hex}"

    # What follows no link. These raise what the system says (OSError), and a UserError where one is in the way.

    def make_folder(self, name: str) -> None:
        """Make a folder, and those in which it lies."""
        self.path.mkdir(parents=True, exist_ok=True)
        if name:
            with _opened(self.path, f"{name}/", make=True):
                pass

    def open(self, name: str, flags: int, mode: int = 0o666) -> int:
        """Open a file that is no link and no pipe, as `os.open` does."""
        with _opened(self.path, name) as (handle, last):
            try:
                fd = os.open(last, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, mode, dir_fd=handle)
            except OSError:
                if _is_link(last, handle):
                    raise planted(self.path / name) from None
                raise
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        raise UserError(f"{self.path / name} is no file")

    def is_there(self, name: str) -> bool:
        """Whether there is something of that name, be it a link."""
        try:
            with _opened(self.path, name) as (handle, last):
                os.lstat(last, dir_fd=handle)
        except FileNotFoundError:
            return False
        return True

    def rename(self, name: str, to: str, make: bool = False) -> None:
        """Let a file or a folder appear under another name, in the place of a file that has it."""
        with _opened(self.path, name) as (source, old), _opened(self.path, to, make) as (target, new):
            os.replace(old, new, src_dir_fd=source, dst_dir_fd=target)

    def sync(self, name: str) -> None:
        """Make durable that there is something of that name, where the file system knows how."""
        with _opened(self.path, name) as (handle, _):
            try:
                os.fsync(handle)
            except OSError as error:  # SMB and FUSE have no fsync of folders
                if error.errno not in _NOT_KNOWN:
                    raise

    def link(self, name: str, to: str) -> None:
        """Let a file appear under a second name that no other has."""
        with _opened(self.path, name) as (source, old), _opened(self.path, to) as (target, new):
            os.link(old, new, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)

    def unlink(self, name: str) -> None:
        with _opened(self.path, name) as (handle, last):
            os.unlink(last, dir_fd=handle)

    def remove_empty(self, name: str) -> None:
        with _opened(self.path, name) as (handle, last):
            os.rmdir(last, dir_fd=handle)

    def names(self, name: str) -> list[str]:
        """Names in a folder, hidden ones too."""
        with _opened(self.path, f"{name}/") as (handle, _):
            return os.listdir(handle)

    def links(self) -> list[str]:
        """The links in it; hidden ones, and what lies in hidden folders, are left out."""
        found = []
        for folder, folders, files in self._walk(self.path):
            folders[:] = sorted(n for n in folders if not n.startswith("."))
            for name in (*folders, *files):
                path = Path(folder, name)
                with plain_errors(path):
                    if not name.startswith(".") and path.is_symlink():
                        found.append(path.relative_to(self.path).as_posix())
        return found

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
                if not self._token or self.is_there(f"{TEMPORARY}/{self._token}"):
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
        with plain_errors(self.path):
            return self.path.is_dir()

    def is_empty(self) -> bool:
        with plain_errors(self.path):
            return not self.path.is_dir() or not any(self.path.iterdir())

    def is_file(self) -> bool:
        with plain_errors(self.path):
            return self.path.exists() and not self.path.is_dir()

    def leads_out(self, name: str) -> bool:
        with plain_errors(self._at(name)):
            root, file = self.path.resolve(), self._at(name).resolve()
        blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
        return root not in file.parents and blobs not in file.parents

    def overlaps(self, other: Store) -> str:
        if not isinstance(other, Folder):
            return ""
        here, there = self.path.resolve(), other.path.resolve()
        if here == there:
            return "same"
        return "holds" if here in there.parents else "inside" if there in here.parents else ""

    def folders(self) -> list[str]:
        with plain_errors(self.path):
            return [path.name for path in self.path.iterdir() if path.is_dir() and not path.name.startswith(".")]

    def files(self, under: str = "") -> dict[str, FileStat]:
        found = {}
        for folder, folders, names in self._walk(self.path / under):
            folders[:] = sorted(n for n in folders if not n.startswith("."))
            real = os.path.realpath(folder)
            for name in sorted(names):
                path = Path(folder, name)
                with plain_errors(path):
                    if not name.startswith(".") and path.is_file():
                        found[path.relative_to(self.path).as_posix()] = _stat(path, real)
        return found

    def _walk(self, path: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        """`os.walk`, with a sentence where a folder cannot be read: what is in it is not left out in silence."""

        def wrong(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                with plain_errors(error.filename or path):
                    raise error

        return os.walk(path, onerror=wrong)

    def has(self, name: str) -> bool:
        path = self._at(name)
        with plain_errors(path):
            return path.is_file()

    def has_folder(self, name: str) -> bool:
        path = self._at(name)
        with plain_errors(path):
            return path.is_dir()

    def size(self, name: str) -> int:
        path = self._at(name)
        with plain_errors(path):
            return path.stat().st_size

    @property
    def local_path(self) -> Path:
        return self.path

    def is_here(self, name: str) -> bool:
        return True

    def changed(self, name: str) -> float:
        path = self._at(name)
        with plain_errors(path):
            return path.stat().st_mtime

    def reader(self, name: str) -> Reader:
        with self._lock:
            if name not in self._readers:
                self._readers[name] = self._open(name)
            return self._readers[name]

    def _open(self, name: str) -> Reader:
        """A file to read, which lies in this folder.

        Raises:
            UserError: it is a link that leads out of it.
        """
        if self.leads_out(name):
            raise UserError(
                f"{self._at(name)} is a link out of its folder; put the file itself there, or give the folder in which "
                "it lies"
            )
        return Reader(self._at(name))

    def close(self) -> None:
        with self._lock:
            for reader in self._readers.values():
                reader.close()
            self._readers.clear()

    def read(self, name: str) -> bytes:
        reader = self._open(name)
        try:
            return reader.read(0, reader.size)
        finally:
            reader.close()

    def write(self, name: str, data: bytes) -> None:
        self._write(name, data, 0o666)

    def write_private(self, name: str, data: bytes) -> bool:
        self._write(name, data, 0o600)
        return True

    def _write(self, name: str, data: bytes, mode: int) -> None:
        self._at(name)
        writer = Writer(self, name, 0, mode)
        try:
            writer.write(0, data)
            writer.publish()
        except BaseException:
            writer.discard()
            raise

    def append(self, name: str, data: bytes, now: bool = False) -> None:
        with plain_errors(self._at(name)):
            self.make_folder(name.rpartition("/")[0])
            fd = self.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            try:
                os.write(fd, data)
            finally:
                os.close(fd)

    def create(self, name: str, size: int) -> Writer:
        self._at(name)
        return Writer(self, name, size)

    def remove(self, name: str) -> None:
        if self._is_folder(name):
            raise UserError(f"{self._at(name)} is a folder; remove it, or give another output folder")
        self.remove_folder(name)

    def remove_folder(self, name: str) -> None:
        path, away = self._at(name), name
        if self._token:  # out of sight at once, if the folder is still held
            away = self.new_temporary()
            with self.changing(path):
                try:
                    self.rename(name, away)
                except FileNotFoundError:
                    if self.is_there(name) or not self.is_there(f"{TEMPORARY}/{self._token}"):
                        raise  # it was there, but the lease's folder is not
                    return
        with plain_errors(path), contextlib.suppress(FileNotFoundError), _opened(self.path, away) as (handle, last):
            if self._is_folder(away):
                shutil.rmtree(last, dir_fd=handle)
            else:
                os.unlink(last, dir_fd=handle)

    def _is_folder(self, name: str) -> bool:
        """Whether it is a folder itself, and no link to one."""
        path = self._at(name)
        with plain_errors(path), contextlib.suppress(FileNotFoundError), _opened(self.path, name) as (handle, last):
            return stat.S_ISDIR(os.lstat(last, dir_fd=handle).st_mode)
        return False

    def free_bytes(self) -> int | None:
        """Bytes left on the file system under the folder, or its nearest parent that exists; None where it does not
        say, as some over a network, which have no blocks at all."""
        path = self.path.absolute()
        with plain_errors(path):
            while not path.exists():
                path = path.parent
            found = os.statvfs(path)
        return found.f_bavail * found.f_frsize if found.f_blocks else None
