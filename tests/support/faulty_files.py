"""A file system that passes everything through to a folder, and misbehaves on the way as real ones do.

python faulty_files.py FOLDER MOUNTPOINT [CALL=ERRNO …] [statfs=0] [in-order=1]

CALL is `fsyncdir`, `fsync`, `link`, `rename`, `read`, `write`, `getattr`, `readdir`, `create` or `mkdir`; it is refused
with ERRNO once the file FOLDER.now is there, or at once if there is no such suffix on it (CALL!=ERRNO waits for it).
`statfs=0` knows no sizes, as shares over a network; `in-order=1` takes bytes in their order only, as object stores do.
Needs libfuse2 (Debian) and fusepy (PyPI).
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import pytest
from needs import DEBIAN
from pace import wait_until

_LIBRARY = next(iter(sorted(DEBIAN.rglob("libfuse.so.2*"))), None) or find_library("fuse")
NEEDS_FUSE = pytest.mark.skipif(
    not (_LIBRARY and Path("/dev/fuse").exists() and os.getuid() == 0), reason="FUSE is not here, or not for this user"
)


@contextmanager
def mounted(folder: Path, point: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """`folder` as it is seen at `point`; the process that serves it, without which it is dead (ENOTCONN)."""
    for path in (folder, point):
        path.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "FUSE_LIBRARY_PATH": str(_LIBRARY)}
    process = subprocess.Popen([sys.executable, __file__, str(folder), str(point), *options], env=environment)
    try:
        wait_until(lambda: os.path.ismount(point) or process.poll() is not None)
        if process.poll() is not None:
            pytest.skip("a file system of one's own cannot be mounted here")
        yield process
    finally:
        subprocess.run(["umount", "-l", str(point)], check=False)
        process.kill()
        process.wait()


def serve(root: str, point: str, options: dict[str, str]) -> None:
    from fuse import FUSE, FuseOSError, Operations  # type: ignore[import-not-found]

    class Files(Operations):  # type: ignore[misc]
        def __call__(self, call: str, path: str, *rest: Any) -> Any:
            code = options.get(call) or (options.get(f"{call}!") if os.path.exists(f"{root}.now") else None)
            if code and code != "0":
                raise FuseOSError(getattr(errno, code))
            try:
                return super().__call__(call, root + path, *rest)
            except OSError as error:
                raise FuseOSError(error.errno) from None

        def getattr(self, path: str, handle: Any = None) -> dict[str, Any]:
            about = os.lstat(path)
            names = ("atime", "ctime", "gid", "mode", "mtime", "nlink", "size", "uid")
            return {f"st_{name}": getattr(about, f"st_{name}") for name in names}

        def readdir(self, path: str, handle: Any) -> list[str]:
            return [".", "..", *os.listdir(path)]

        def mkdir(self, path: str, mode: int) -> None:
            os.mkdir(path, mode)

        def rmdir(self, path: str) -> None:
            os.rmdir(path)

        def unlink(self, path: str) -> None:
            os.unlink(path)

        def rename(self, old: str, new: str) -> None:
            os.rename(old, root + new)

        def link(self, target: str, source: str) -> None:
            os.link(root + source, target)

        def chmod(self, path: str, mode: int) -> None:
            os.chmod(path, mode)

        def utimens(self, path: str, times: Any = None) -> None:
            os.utime(path, times)

        def open(self, path: str, flags: int) -> int:
            return os.open(path, flags)

        def create(self, path: str, mode: int, info: Any = None) -> int:
            return os.open(path, os.O_RDWR | os.O_CREAT, mode)

        def read(self, path: str, size: int, offset: int, handle: int) -> bytes:
            return os.pread(handle, size, offset)

        def write(self, path: str, data: bytes, offset: int, handle: int) -> int:
            if options.get("in-order") == "1" and offset != os.fstat(handle).st_size:
                raise FuseOSError(errno.EINVAL)
            return os.pwrite(handle, data, offset)

        def truncate(self, path: str, length: int, handle: Any = None) -> None:
            os.truncate(path, length)

        def flush(self, path: str, handle: int) -> int:
            return 0

        def release(self, path: str, handle: int) -> None:
            os.close(handle)

        def fsync(self, path: str, data_only: Any, handle: int) -> int:
            return 0

        def fsyncdir(self, path: str, data_only: Any, handle: int) -> int:
            return 0

        def statfs(self, path: str) -> dict[str, int]:
            if options.get("statfs") == "0":
                return {"f_bsize": 4096, "f_frsize": 4096, "f_namemax": 255}
            about = os.statvfs(root)
            return {name: getattr(about, name) for name in dir(about) if name.startswith("f_") and name != "f_fsid"}

    FUSE(Files(), point, foreground=True, nothreads=True, fsname="faulty")


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], dict(word.split("=") for word in sys.argv[3:]))
