"""Addresses of folders: a path, a bucket's, or a repository's. What they mean, and the store at each."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from fapm.errors import UserError, without_secrets
from fapm.storage.layers import Layers
from fapm.storage.local import Folder, plain_errors, planted
from fapm.storage.store import Store

BUCKETS = ("s3", "gs", "az")
"""Schemes of object stores."""

HUB = "hf"

LAYERS = "layers"
"""Several folders, one over the other; only made here, by `layered`."""
_BETWEEN = "|"

_SHORT = re.compile(r"[\w][\w.-]*/[\w.-]+(@[^\s@]+)?")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://")


def scheme_of(address: str) -> str:
    """`s3` of `s3://bucket/folder`; nothing of a local path."""
    found = _SCHEME.match(address)
    return found[1] if found else ""


def is_repository(address: str) -> bool:
    """Whether an address is that of a repository of the Hub."""
    return scheme_of(address) == HUB


def open_store(address: str) -> Store:
    """The folder at an address. Nothing is asked of it yet; `storage.lease` gives one that may be changed.

    Raises:
        UserError: there are no such addresses.
    """
    scheme = scheme_of(address)
    if without_secrets(address) != address:
        raise UserError(
            f"{address}: an address has no key and secret in it, which would be repeated wherever it is written; they "
            "come from the environment or from a profile"
        )
    if scheme in BUCKETS:
        from fapm.storage.bucket import Bucket

        return Bucket(address)
    if is_repository(address):
        from fapm.storage.hub import Repository

        return Repository(address)
    if scheme == LAYERS:
        return Layers(address, [open_store(part) for part in layers_of(address)])
    if scheme:
        raise UserError(f"{address}: there are paths, s3://, gs://, az:// and hf://, but no {scheme}://")
    return Folder(address)


def layered(addresses: Sequence[str]) -> str:
    """One address of several folders of which each goes over those before it; of one, its own.

    Raises:
        UserError: one cannot be among others.
    """
    for address in addresses:
        if _BETWEEN in address or scheme_of(address) == LAYERS:
            raise UserError(f"{address}: a folder with {_BETWEEN} in its name cannot be one of several")
    return addresses[0] if len(addresses) == 1 else f"{LAYERS}://{_BETWEEN.join(addresses)}"


def layers_of(address: str) -> list[str]:
    """The addresses of which one was made."""
    return address.removeprefix(f"{LAYERS}://").split(_BETWEEN) if scheme_of(address) == LAYERS else [address]


def input_address(address: str) -> str:
    """Address of an input as a user means it: a folder here if there is one, else `org/name` on the Hub; of a
    repository the commit, so that it means the same for all workers, and tomorrow.

    Raises:
        UserError: the Hub has no such repository, or does not say.
    """
    scheme = scheme_of(address)
    if scheme == LAYERS:
        return layered([input_address(part) for part in layers_of(address)])
    if _is_short(address):
        try:
            return _pinned(f"{HUB}://{address}", patient=False)  # perhaps it is but a path that is misspelt
        except UserError as error:  # also where the Hub does not answer: a path that is misspelt stays so
            raise UserError(f"there is no folder {address}; {error}") from None
    return _pinned(address) if scheme == HUB else address


def _is_short(address: str) -> bool:
    """Whether `org/name` means a repository: no folder of that name is here, nor one in which it could be."""
    may_be = not scheme_of(address) and bool(_SHORT.fullmatch(address))
    return may_be and not Path(address).exists() and not Path(address).parent.is_dir()


def input_elsewhere(address: str) -> str:
    """The same input for processes on other machines; of a repository the commit, if the Hub says it here."""
    if scheme_of(address) == LAYERS:
        return layered([input_elsewhere(part) for part in layers_of(address)])
    found = f"{HUB}://{address}" if _is_short(address) else absolute(address)
    with contextlib.suppress(UserError):
        return _pinned(found, patient=False) if is_repository(found) else found
    return found


def _pinned(address: str, patient: bool = True) -> str:
    from fapm.storage.hub import Repository

    return Repository(address).pinned(patient)


def repository_of(address: str, pinned: bool = False) -> str:
    """The name of a repository on the Hub, with its revision if `pinned`; nothing if the address is none of one."""
    if scheme_of(address) != HUB:
        return ""
    name = address.removeprefix(f"{HUB}://")
    return address if pinned else name.partition("@")[0]


def absolute(address: str) -> str:
    """The same for processes with another working directory."""
    if scheme_of(address) == LAYERS:
        return layered([absolute(part) for part in layers_of(address)])
    return address if scheme_of(address) else os.path.abspath(address)


def split(address: str) -> tuple[str, str]:
    """The address of the folder that holds it, and its name there."""
    if scheme_of(address) == LAYERS:
        parts = [split(part) for part in layers_of(address)]
        return parts[0][0], "+".join(name for _, name in parts)
    if not scheme_of(address):
        path = Path(address)
        return str(path.parent), path.name
    address = address.partition("@")[0] if is_repository(address) else address
    parent, _, name = address.rstrip("/").rpartition("/")
    return parent, name


def inside(address: str, name: str) -> str:
    """The address of a folder in another.

    Raises:
        UserError: it is a link.
    """
    if scheme_of(address):
        return f"{address.rstrip('/')}/{name}"
    path = Path(address, name)
    with plain_errors(path):
        if path.is_symlink():
            raise planted(path)
    return str(path)


def matching(pattern: str) -> list[str]:
    """The addresses that match a pattern as of `glob`."""
    if scheme_of(pattern):
        from fapm.storage import bucket

        return bucket.matching(pattern)
    return glob.glob(pattern)
