"""Folders in object stores: S3 and what is compatible with it, Google Cloud Storage, Azure Blob Storage.

obstore moves the bytes; boto3, where it is installed, finds S3's credentials as every other tool does, and ends uploads
that nobody will complete. There is no rename: an object appears when its upload is completed, whole or not at all. Who
writes under a lease asks before each change whether its lock is still the newest, and its own by the token in it. What
is uploaded in parts has begun before that, and a successor ends all uploads that are under way; what is small is put in
one request, on the condition that nobody has written it since. So nothing that a predecessor began appears after, or
over, what its successor wrote (`tests/pipeline/storage/test_protocol.py` looks at every order).
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotSupportedError,
    PreconditionError,
)
from obstore.store import from_url
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from fapm.errors import PassingError, TakenOverError, UserError
from fapm.layout import LOCKS
from fapm.storage.answers import FINAL, code_of, explained
from fapm.storage.s3 import boto3_client, obstore_options
from fapm.storage.store import FileStat, Store

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

PATIENCE_SECONDS = 120.0
"""How long a request is tried again before a run gives up, with growing pauses of random length in between."""
PART_BYTES = 8 << 20
"""Of an upload, or so many that there are no more than MOST_PARTS."""
MOST_PARTS = 9_000
APPEND_SECONDS = 5.0
"""Between two writings of a file that is added to: it is written anew each time."""
CHECK_SECONDS = 1.0
"""For so long one is taken for the holder who was it."""

_REQUEST_BYTES = 16 << 20  # of a file, at once
_PARTS_AT_ONCE = 4
_PUTS = 20  # of one small file, where each meets another's
CLIENT: ClientConfig = {
    "connect_timeout": timedelta(seconds=5),
    "read_timeout": timedelta(seconds=30),
    "timeout": timedelta(seconds=300),
}
RETRY: RetryConfig = {
    "max_retries": 8,
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10), "base": 2},
    "retry_timeout": timedelta(seconds=20),
}
NO_RETRY: RetryConfig = {**RETRY, "max_retries": 0}


@contextlib.contextmanager
def plain_errors(address: str) -> Iterator[None]:
    """Turn what a store answers into a sentence (`storage.answers`)."""
    try:
        yield
    except (BaseError, OSError) as error:
        raise explained(address, error) from None


Found = TypeVar("Found")


def patiently(address: str, ask: Callable[[], Found], seconds: float | None = None) -> Found:
    """The answer to a request that may be made twice, asked again while the reason for having none may pass.

    Args:
        seconds: for how long, PATIENCE_SECONDS by default.
    """
    tries = Retrying(
        retry=retry_if_exception(lambda e: isinstance(e, PassingError) and not isinstance(e, TakenOverError)),
        wait=wait_random_exponential(multiplier=0.2, max=10),
        stop=stop_after_delay(PATIENCE_SECONDS if seconds is None else seconds),
        reraise=True,
    )

    def once() -> Found:
        with plain_errors(address):
            return ask()

    return tries(once)


class _ShortError(BaseError):
    """A body that is shorter than was asked for."""

    def __init__(self) -> None:
        super().__init__("source: HTTP: a short body")


class ObjectReader:
    """An object, read by ranges; if it is replaced meanwhile, that is an error."""

    def __init__(self, client: Any, path: str, address: str, size: int, etag: str | None = None):
        self._store, self._path, self._address = client, path, address
        self.size, self._etag = size, etag

    def read_into(self, offset: int, target: np.ndarray) -> None:
        for start in range(0, target.size, _REQUEST_BYTES):
            part = target[start : start + _REQUEST_BYTES]
            patiently(self._address, functools.partial(self._get, offset + start, part))

    def _get(self, offset: int, target: np.ndarray) -> None:
        end = offset + target.size
        if end > self.size:
            raise UserError(f"{self._address}: the file ends at byte {self.size}; it was cut short while in use")
        options: Any = {"range": (offset, end), "if_match": self._etag} if self._etag else {"range": (offset, end)}
        done = 0
        for data in obstore.get(self._store, self._path, options=options).stream(min_chunk_size=1 << 20):
            here = np.frombuffer(memoryview(data), np.uint8)
            target[done : done + here.size] = here[: target.size - done]
            done += here.size
        if done != target.size:
            raise _ShortError

    def read_rows(self, offsets: Sequence[int], rows: np.ndarray) -> None:
        if not len(offsets):
            return
        lengths = [rows.shape[1]] * len(offsets)

        def ask() -> None:
            found = obstore.get_ranges(self._store, self._path, starts=list(offsets), lengths=lengths, coalesce=4096)
            for row, data in zip(rows, found, strict=True):
                if len(data) != row.size:
                    raise _ShortError
                row[:] = np.frombuffer(memoryview(data), np.uint8)

        patiently(self._address, ask)

    def read(self, offset: int, length: int) -> bytes:
        target = np.empty(length, np.uint8)
        self.read_into(offset, target)
        return target.tobytes()

    def close(self) -> None:
        """Nothing is held open."""


class ObjectWriter:
    """An object on its way; what is written must come in order."""

    def __init__(self, folder: Bucket, name: str, size: int):
        self._folder, self._name, self._address = folder, name, folder.at(name)
        self._before = folder.head(name)
        self._part = max(PART_BYTES, -(-size // MOST_PARTS))
        self._small = bytearray() if size <= self._part else None  # else it would be one request without a condition
        with plain_errors(self._address):
            self._file = obstore.open_writer(
                folder.patient_client, folder.key(name), buffer_size=self._part, max_concurrency=_PARTS_AT_ONCE
            )
        self._position = 0

    def write(self, offset: int, data: np.ndarray | bytes) -> None:
        assert offset == self._position, (offset, self._position)
        view = memoryview(data) if isinstance(data, bytes) else data.data
        if self._small is not None:
            self._small += view
            self._position += view.nbytes
            return
        with plain_errors(self._address):
            for start in range(0, view.nbytes, self._part):
                self._file.write(bytes(view[start : start + self._part]))  # it is sent later, and not copied before
        self._position += view.nbytes

    def publish(self) -> None:
        if self._small is not None:
            self._folder.write(self._name, bytes(self._small))
            return
        self._folder.check()
        try:
            with plain_errors(self._address):
                self._file.close()
        except UserError:
            self._folder.check()
            if not self._is_there():
                raise

    def _is_there(self) -> bool:
        """Whether the upload was completed all the same, and only the answer lost."""
        now, before = self._folder.head(self._name), self._before
        return bool(now and now["size"] == self._position and (not before or before["e_tag"] != now["e_tag"]))

    def discard(self) -> None:
        with contextlib.suppress(Exception):
            self._file.__exit__(RuntimeError, RuntimeError(), None)


class Bucket:
    """A `Store` in an object store.

    Args:
        address: like s3://bucket/folder.
        token: of the lease under which it is changed, and `number`: of that lease's lock.
    """

    reads_at_once = 16
    writing_bytes = (_PARTS_AT_ONCE + 1) * PART_BYTES

    def __init__(self, address: str, token: str = "", number: int = 0):
        self.address = address.rstrip("/")
        self.token, self.number = token, number
        scheme, _, rest = self.address.partition("://")
        bucket, _, self._prefix = rest.partition("/")
        if not bucket or "//" in rest or any(part in (".", "..") for part in rest.split("/")):
            raise UserError(f"{address}: give {scheme}://BUCKET/FOLDER")
        self._root = f"{scheme}://{bucket}"
        self._readers: dict[str, ObjectReader] = {}
        self._lock = threading.Lock()
        self._added: dict[str, tuple[bytes, float]] = {}  # files that are added to, and when they were written
        self._checked = -CHECK_SECONDS

    def __reduce__(self) -> tuple[type[Bucket], tuple[str, str, int]]:
        return Bucket, (self.address, self.token, self.number)

    @property
    def client(self) -> Any:
        return _client(self._root)

    @property
    def patient_client(self) -> Any:
        return _client(self._root, patient=True)

    def key(self, name: str) -> str:
        """The object's name in its bucket."""
        if name.startswith("/") or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise UserError(f"{self.address}: refused the file name {name!r}, which leads out of the folder")
        return f"{self._prefix}/{name}" if self._prefix else name

    def at(self, name: str) -> str:
        return f"{self.address}/{name}"

    def absolute(self) -> Bucket:
        return self

    def exists(self) -> bool:
        return bool(self._list("", 1))

    def is_empty(self) -> bool:
        return not self.exists()

    def is_file(self) -> bool:
        return bool(self._prefix) and not self.exists() and self._head(self._prefix) is not None

    def leads_out(self, name: str) -> bool:
        return False

    def links(self) -> list[str]:
        return []

    def overlaps(self, other: Store) -> str:
        if not isinstance(other, Bucket):
            return ""
        if self.address == other.address:
            return "same"
        if other.address.startswith(self.address + "/"):
            return "holds"
        return "inside" if self.address.startswith(other.address + "/") else ""

    def files(self, under: str = "") -> dict[str, FileStat]:
        found = {}
        for meta in self._list(under):
            name = meta["path"][len(self._prefix) + 1 if self._prefix else 0 :]
            if not any(part.startswith(".") for part in name.split("/")):
                found[name] = FileStat(meta["size"], {"etag": meta["e_tag"] or meta["last_modified"].isoformat()})
        return found

    def _list(self, under: str, most: int | None = None) -> list[Any]:
        prefix = "/".join(part for part in (self._prefix, under) if part)

        def ask() -> list[Any]:
            found: list[Any] = []
            for page in obstore.list(self.client, prefix or None, chunk_size=1000):
                found += [meta for meta in page if meta["size"] or not self._is_marker(meta["path"])]
                if most and len(found) >= most:
                    break
            return found

        return patiently(self.address, ask)

    def _is_marker(self, path: str) -> bool:
        """Whether an object of no bytes is the mark of a folder, as consoles leave it.

        Its name ends with a slash, which is not listed, and without it there is none.
        """
        return path == self._prefix or self._head(path) is None

    def folders(self) -> list[str]:
        found = self._inside(self._prefix)
        return [name for name in found if not name.startswith(".")]

    def _inside(self, prefix: str) -> list[str]:
        """The folders in one, by their last names."""
        answer = patiently(self.address, lambda: obstore.list_with_delimiter(self.client, prefix or None))
        return [path.rstrip("/").rpartition("/")[2] for path in answer["common_prefixes"]]

    def has(self, name: str) -> bool:
        return self.head(name) is not None

    def head(self, name: str) -> Any:
        """Metadata of a file, or None if it is not there."""
        return self._head(self.key(name))

    def has_folder(self, name: str) -> bool:
        return bool(self._list(name, 1))

    def _head(self, key: str) -> Any:
        def ask() -> Any:
            try:
                return obstore.head(self.client, key)
            except FileNotFoundError as error:
                if code_of(str(error)) in FINAL:
                    raise
                return None

        return patiently(self.address, ask)

    def _meta(self, name: str) -> Any:
        return patiently(self.at(name), lambda: obstore.head(self.client, self.key(name)))

    def size(self, name: str) -> int:
        return int(self._meta(name)["size"])

    @property
    def local_path(self) -> None:
        return None

    def is_here(self, name: str) -> bool:
        return False

    def changed(self, name: str) -> float:
        return float(self._meta(name)["last_modified"].timestamp())

    def reader(self, name: str) -> ObjectReader:
        with self._lock:
            if name in self._readers:
                return self._readers[name]
        meta = self._meta(name)
        found = ObjectReader(self.client, self.key(name), self.at(name), meta["size"], meta["e_tag"])
        with self._lock:
            return self._readers.setdefault(name, found)

    def close(self) -> None:
        with self._lock:
            self._readers.clear()

    def read(self, name: str) -> bytes:
        return patiently(self.at(name), lambda: bytes(obstore.get(self.client, self.key(name)).bytes()))

    def write_private(self, name: str, data: bytes) -> bool:
        return False

    def write(self, name: str, data: bytes) -> None:
        if not self.token:
            patiently(self.at(name), lambda: obstore.put(self.client, self.key(name), data, use_multipart=False))
            return
        for _ in range(_PUTS):
            if patiently(self.at(name), lambda: self._put(name, data)):
                return  # else somebody else has written it: a predecessor that is late, or a successor: `_put` knows
        raise PassingError(f"{self.at(name)} is written again and again by another; look who else is at work there")

    def _put(self, name: str, data: bytes) -> bool:
        """Write a file if nobody writes it meanwhile; whether that is so."""
        key = self.key(name)
        before = self._tag(key)
        self._check_now_and_then()
        mode: Any = "create" if before is None else before or "overwrite"
        try:
            obstore.put(self.client, key, data, mode=mode, use_multipart=False)
        except (AlreadyExistsError, PreconditionError):
            if self._content(key) == data:  # by this very request, whose answer was lost
                return True
            if not before or self._tag(key) != before:
                return False
            # Nobody has written it: this store does not know its own tag, as Ceph's gateway none in quotes.
            obstore.put(self.client, key, data, use_multipart=False)
        except NotSupportedError:  # of conditions on what is there; those on locks are tried when one is made
            obstore.put(self.client, key, data, use_multipart=False)
        return True

    def _tag(self, key: str) -> dict[str, Any] | None:
        """By what a store tells a file from what it was, empty where it does not; None if the file is not there."""
        try:
            found = obstore.head(self.client, key)
        except FileNotFoundError:
            return None
        return {part: found[part] for part in ("e_tag", "version") if found[part]}

    def _content(self, key: str) -> bytes | None:
        try:
            return bytes(obstore.get(self.client, key).bytes())
        except FileNotFoundError:
            return None

    def write_new(self, name: str, data: bytes) -> bool:
        """Write a file that is not there; whether it was not, and is now."""
        key = self.key(name)

        def ask() -> bool:
            with contextlib.suppress(AlreadyExistsError):  # perhaps by this very request, whose answer was lost
                obstore.put(self.client, key, data, mode="create")
            return self._content(key) == data  # where the condition is ignored, another may have written it since

        return patiently(self.at(name), ask)

    def refuses_a_second(self, name: str, data: bytes) -> bool:
        """Whether the store keeps its word: a file that is there cannot be made once more. `data` is what it holds."""
        key = self.key(name)

        def ask() -> bool:
            try:
                obstore.put(self.client, key, data, mode="create")
            except AlreadyExistsError:
                return True
            except NotSupportedError:
                return False
            return False

        return patiently(self.at(name), ask)

    def append(self, name: str, data: bytes, now: bool = False) -> None:
        if name not in self._added:
            self._added[name] = (self.read(name) if self.has(name) else b""), 0.0
        before, written = self._added[name]
        if now or time.monotonic() - written > APPEND_SECONDS:
            self.write(name, before + data)
            written = time.monotonic()
        self._added[name] = before + data, written

    def create(self, name: str, size: int) -> ObjectWriter:
        self._check_now_and_then()
        return ObjectWriter(self, name, size)

    def remove(self, name: str) -> None:
        self._check_now_and_then()
        self._delete([self.key(name)])

    def remove_folder(self, name: str) -> None:
        self._check_now_and_then()
        self._delete([meta["path"] for meta in self._list(name)])

    def _delete(self, keys: list[str]) -> None:
        def ask() -> None:
            for first in range(0, len(keys), 1000):
                many = keys[first : first + 1000]
                try:
                    obstore.delete(self.client, many)
                except FileNotFoundError:  # of one, at which some stores stop
                    for key in many:
                        with contextlib.suppress(FileNotFoundError):
                            obstore.delete(self.client, key)

        patiently(self.address, ask)

    def free_bytes(self) -> None:
        return None

    # Under a lease.

    def under(self, token: str, number: int) -> Bucket:
        """The folder, to be changed under a lease."""
        return Bucket(self.address, token, number)

    def locks(self) -> list[int]:
        """The numbers of the locks that are there."""
        names = (meta["path"].rpartition("/")[2] for meta in self._list(LOCKS))
        return sorted(int(name) for name in names if name.isdecimal())

    def check(self) -> None:
        """Whether the lease is still the newest, and its lock this run's own.

        Raises:
            TakenOverError: another run has taken the folder over.
        """
        if self.token and not self._is_held():
            raise TakenOverError(
                f"--out {self.address} was taken over by another run or removed while this one was at work; "
                "this one has ended without changing anything since"
            )

    def _is_held(self) -> bool:
        there = self.locks()
        if not there or there[-1] != self.number:
            return False
        lock = f"{LOCKS}/{self.number:06d}"
        found = patiently(self.at(lock), lambda: self._content(self.key(lock)))
        return found is not None and self.token.encode() in found

    def _check_now_and_then(self) -> None:
        """For what is small: a lease is only lost by one that stands still for much longer."""
        if time.monotonic() - self._checked > CHECK_SECONDS:
            self.check()
            self._checked = time.monotonic()

    def end_uploads(self) -> None:
        """End all uploads into this folder that are under way; none can be completed after that. Only S3 says which
        there are: in others such parts are removed by the store after a while."""
        if not self._root.startswith("s3:"):
            return
        bucket = self._root.partition("://")[2]
        s3 = boto3_client(bucket)
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            for page in s3.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=self._prefix):
                for upload in page.get("Uploads", ()):
                    if not self._prefix or upload["Key"].startswith(self._prefix + "/"):
                        with contextlib.suppress(s3.exceptions.NoSuchUpload):
                            s3.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            raise UserError(
                f"{self.address}: unfinished uploads cannot be listed and ended ({code}); allow "
                "s3:ListBucketMultipartUploads and s3:AbortMultipartUpload"
            ) from None
        except BotoCoreError as error:
            raise PassingError(f"{self.address}: the store does not answer ({type(error).__name__})") from None


@functools.cache
def _client(root: str, patient: bool = False) -> Any:
    """obstore's client of a bucket, one a process.

    Args:
        patient: it asks again itself, as for parts of uploads it has to. Elsewhere `patiently` does, which knows what
            is final.
    """
    options: dict[str, Any] = {**CLIENT, "allow_http": True}  # where the user has named such an endpoint
    config: dict[str, Any] = {}
    if root.startswith("s3:"):
        config, more = obstore_options(root.removeprefix("s3://"))
        options |= more
    try:
        retry: Any = RETRY if patient else NO_RETRY
        make: Any = from_url
        return make(root, client_options=options, retry_config=retry, **config)
    except (BaseError, ValueError) as error:
        why = re.sub(r"\?\S*", "", str(error).splitlines()[0])  # what follows may be a signature
        raise UserError(f"{root}: what the environment says of this store cannot be used: {why}") from None


def matching(pattern: str) -> list[str]:
    """The addresses of folders that match a pattern of `glob`, whose * stands for nothing with a slash in it."""
    scheme, _, rest = pattern.partition("://")
    bucket, *levels = rest.split("/")
    store = Bucket(f"{scheme}://{bucket}")
    found = [""]
    for level in levels:
        if not re.search(r"[*?[]", level):
            found = [f"{prefix}/{level}".lstrip("/") for prefix in found]
        else:
            found = [
                f"{prefix}/{name}".lstrip("/")
                for prefix in found
                for name in store._inside(prefix)
                if fnmatch.fnmatchcase(name, level)
            ]
    return [f"{scheme}://{bucket}/{prefix}" for prefix in found]
