"""Repositories of the Hugging Face Hub as inputs: read by ranges, or from the local cache where it has the files.

huggingface_hub finds the commit, the files and the token, and knows HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE; the bytes
come through obstore like those of any object store.
"""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is that of the client it uses
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from obstore.store import HTTPStore

from fapm.errors import PassingError, UserError
from fapm.storage.answers import of_the_network
from fapm.storage.bucket import CLIENT, NO_RETRY, ObjectReader, patiently
from fapm.storage.local import Reader
from fapm.storage.store import FileStat, Store

_ADDRESS = re.compile(r"hf://([\w][\w.-]*/[\w.-]+)(?:@([^/@\s][^@\s]*))?")
_SECONDS = 15.0


@contextlib.contextmanager
def plain_errors(address: str) -> Iterator[None]:
    """Turn what the Hub answers into a sentence."""
    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"{address} is gated: accept its conditions on its page at {constants.ENDPOINT}, then `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"there is no {address} on the Hub, or it is private: `hf auth login`, or set HF_TOKEN, to see it"
        ) from None
    except LocalTokenNotFoundError:
        raise UserError(f"{address}: nobody is logged in: `hf auth login`, or set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise UserError(f"{address}: the repository has no such revision") from None
    except HFValidationError:
        raise _no_address(address) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        why = " ".join(str(error.server_message or "").split())[:300]
        if status in (401, 403):
            # It may be a limit of storage, or a kind of token: the Hub says which.
            hint = why or "see `hf auth login`"
            raise UserError(f"{address}: the Hub denies access ({status}): {hint}") from None
        said = f"{address}: the Hub answers {status}{': ' + why if why else ''}"
        if (400 <= status < 500 and status not in (408, 425, 429)) or status == 501:
            raise UserError(said) from None
        raise PassingError(f"{said}; run the same command again later") from None
    except (HTTPError, OSError) as error:
        raise of_the_network(address, f"HTTP error at {constants.ENDPOINT} {type(error).__name__}: {error}") from None


def _no_address(address: str) -> UserError:
    return UserError(f"{address}: give hf://ORGANISATION/NAME, with @REVISION if not the main one is meant")


@dataclass(frozen=True)
class Snapshot:
    """A commit of a repository, and its files."""

    commit: str
    files: dict[str, FileStat]


class Repository:
    """A `Store` that is only read.

    Args:
        address: like hf://org/name@revision.
    """

    reads_at_once = 16
    writing_bytes = 0

    def __init__(self, address: str):
        found = _ADDRESS.fullmatch(address)
        if not found:
            raise _no_address(address)
        self.address = address
        self.name, self.revision = found[1], found[2] or "main"
        self._readers: dict[str, Any] = {}

    def __reduce__(self) -> tuple[type[Repository], tuple[str]]:
        return Repository, (self.address,)

    @property
    def _snapshot(self) -> Snapshot:
        return _look(self.address, self.name, self.revision)

    def pinned(self, patient: bool = True) -> str:
        """The address of the commit that its revision means now.

        Args:
            patient: ask again where the Hub does not answer.
        """
        return f"hf://{self.name}@{_look(self.address, self.name, self.revision, patient).commit}"

    def at(self, name: str) -> str:
        return f"{self.address}/{name}"

    def absolute(self) -> Repository:
        return self

    def exists(self) -> bool:
        return bool(self._snapshot)

    def is_empty(self) -> bool:
        return not self._snapshot.files

    def is_file(self) -> bool:
        return False

    def leads_out(self, name: str) -> bool:
        return False

    def links(self) -> list[str]:
        return []

    def overlaps(self, other: Store) -> str:
        return "same" if isinstance(other, Repository) and other.name == self.name else ""

    def files(self, under: str = "") -> dict[str, FileStat]:
        start = f"{under}/" if under else ""
        found = {name: stat for name, stat in self._snapshot.files.items() if name.startswith(start)}
        return {name: stat for name, stat in found.items() if not any(p.startswith(".") for p in name.split("/"))}

    def folders(self) -> list[str]:
        return sorted({name.partition("/")[0] for name in self.files() if "/" in name})

    def has(self, name: str) -> bool:
        return name in self._snapshot.files

    def has_folder(self, name: str) -> bool:
        return bool(self.files(name))

    def size(self, name: str) -> int:
        return self._stat(name).size

    def _stat(self, name: str) -> FileStat:
        if not self.has(name):
            raise UserError(f"there is no {self.at(name)}")
        return self._snapshot.files[name]

    @property
    def local_path(self) -> None:
        return None

    def is_here(self, name: str) -> bool:
        return self.cached(name) is not None

    def changed(self, name: str) -> float:
        return 0.0  # all of a commit at once

    def cached(self, name: str) -> Path | None:
        """Where a file lies in the local cache, if it does, whole."""
        found = try_to_load_from_cache(self.name, name, revision=self._snapshot.commit)
        if isinstance(found, str) and Path(found).is_file() and Path(found).stat().st_size == self._stat(name).size:
            return Path(found)
        return None

    def reader(self, name: str) -> Any:
        if name not in self._readers:
            size, cached = self._stat(name).size, self.cached(name)
            if cached:
                self._readers[name] = Reader(cached)
            else:
                if constants.HF_HUB_OFFLINE:
                    raise UserError(f"{self.at(name)} is not in the local cache, and HF_HUB_OFFLINE is set")
                client = _client(self.name, self._snapshot.commit)
                self._readers[name] = ObjectReader(client, name, self.at(name), size)
        return self._readers[name]

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def read(self, name: str) -> bytes:
        data: bytes = self.reader(name).read(0, self.size(name))
        return data

    def refuse(self, *_: Any) -> NoReturn:
        raise UserError(f"{self.address}: a repository changes by commits only")

    write = write_private = append = create = remove = remove_folder = free_bytes = refuse


@functools.cache
def _look(address: str, name: str, revision: str, patient: bool = True) -> Snapshot:
    if constants.HF_HUB_OFFLINE:
        return _in_cache(address, name, revision)

    def ask() -> Any:
        with plain_errors(address):  # before the others see what it is
            return HfApi().repo_info(name, revision=revision, files_metadata=True, timeout=_SECONDS)

    try:
        info = patiently(address, ask, _SECONDS if patient else 0)
    except PassingError:
        with contextlib.suppress(UserError):  # perhaps the cache has all that is needed
            return _in_cache(address, name, revision)
        raise
    files = {}
    for entry in info.siblings or ():
        oid = entry.lfs.sha256 if entry.lfs else entry.blob_id
        files[entry.rfilename] = FileStat(entry.size or 0, {"etag": oid or ""})
    return Snapshot(str(info.sha), files)


def _in_cache(address: str, name: str, revision: str) -> Snapshot:
    """Cached files of a commit."""
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise UserError(f"{address} is not in the local cache, and the Hub cannot be asked (HF_HUB_OFFLINE)") from None
    files = {
        path.relative_to(folder).as_posix(): FileStat(path.stat().st_size, {"etag": path.resolve().name})
        for path in folder.rglob("*")
        if path.is_file()
    }
    return Snapshot(folder.name, files)


@functools.cache
def _client(name: str, commit: str) -> Any:
    token = get_token()
    headers = {"authorization": f"Bearer {token}"} if token else {}
    url = f"{constants.ENDPOINT}/{name}/resolve/{commit}"
    options: Any = {**CLIENT, "default_headers": headers, "allow_http": url.startswith("http:")}
    return HTTPStore.from_url(url, client_options=options, retry_config=NO_RETRY)


class Target:
    """A repository that is written to, by one commit.

    Args:
        address: like hf://org/name@branch.
        private: what it becomes if it is not there yet.
    """

    def __init__(self, address: str, private: bool):
        found = _ADDRESS.fullmatch(address)
        if not found:
            raise _no_address(address)
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"--out {address}: HF_HUB_OFFLINE is set, and nothing can be uploaded")
        self.address, self.name, self.branch = address, found[1], found[2] or "main"
        self._private = private
        self._head: str | None = None
        self._files: list[str] = []
        self._api = HfApi()

    def read(self, *names: str) -> dict[str, bytes]:
        """Those of some files that the newest commit has; nothing if there is no such repository."""
        _look.cache_clear()
        try:
            there = Repository(f"hf://{self.name}@{_look(self.address, self.name, self.branch).commit}")
        except PassingError:
            raise
        except UserError:
            return {}
        return {name: there.read(name) for name in names if there.has(name)}

    def begin(self) -> None:
        """Make the repository and the branch if they are not there, and remember the commit that comes before.

        Raises:
            UserError: the token does not allow it.
        """
        with plain_errors(self.address):
            self._api.create_repo(self.name, private=self._private, exist_ok=True)
            if self.branch != "main":
                self._api.create_branch(self.name, branch=self.branch, exist_ok=True)
            info = self._api.model_info(self.name, revision=self.branch, timeout=_SECONDS)
        self._head, self._files = info.sha, [entry.rfilename for entry in info.siblings or ()]

    def upload(self, name: str, source: Any) -> CommitOperationAdd:
        """Bring a large file's bytes to the Hub, where nobody sees them before the commit."""
        addition = CommitOperationAdd(path_in_repo=name, path_or_fileobj=source)

        def ask() -> CommitOperationAdd:
            with plain_errors(self.address):
                self._api.preupload_lfs_files(self.name, [addition], revision=self.branch, free_memory=False)
            return addition

        return patiently(self.address, ask)

    def commit(self, uploaded: dict[str, CommitOperationAdd], files: dict[str, bytes], message: str) -> None:
        """Let all appear, and what a checkpoint there was before consisted of disappear, in one step.

        Raises:
            UserError: another commit came in between.
        """
        operations: list[Any] = [*uploaded.values()]
        operations += [CommitOperationAdd(path_in_repo=n, path_or_fileobj=data) for n, data in sorted(files.items())]
        mine = uploaded.keys() | files.keys()
        old = [n for n in self._files if n.endswith((".safetensors", ".safetensors.index.json")) and "/" not in n]
        operations += [CommitOperationDelete(path_in_repo=name) for name in old if name not in mine]
        try:
            with plain_errors(self.address), warnings.catch_warnings():
                # The table of a run is no data set that was put into a model's repository by mistake.
                warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")
                self._api.create_commit(
                    self.name, operations, commit_message=message, revision=self.branch, parent_commit=self._head
                )
        except UserError as error:
            if "412" in str(error) or "409" in str(error):
                raise UserError(
                    f"{self.address} has got another commit since this run began; look at it, then run again"
                ) from None
            raise
