"""The newest checkpoint of a folder, for paths like `runs/latest`."""

from __future__ import annotations

import re

from fapm.errors import UserError
from fapm.formats.checkpoint import INDEX_SUFFIX, open_checkpoint
from fapm.storage.address import input_address, inside, open_store, split

LATEST = "latest"


def newest(path: str, role: str) -> tuple[str, tuple[str, ...]]:
    """Meaning of `FOLDER/latest` where nothing of that name is there: the newest whole checkpoint in FOLDER.

    Newest is the one with the highest number where the names differ in their numbers alone (checkpoint-500 and
    checkpoint-1000), else the one whose weights were written last. One that is not whole, perhaps because it is still
    being written, is passed over.

    Returns:
        The path itself, or the newest checkpoint's and a sentence for each that was passed over.

    Raises:
        UserError: the folder holds no whole checkpoint.
    """
    path = input_address(path)
    folder, name = split(path)
    if name != LATEST or open_store(path).exists() or open_store(path).is_file() or not open_store(folder).exists():
        return path, ()
    passed: list[str] = []
    for candidate in _newest_first(folder):
        why = _not_whole(candidate, role)
        if why is None:
            return candidate, tuple(passed)
        passed.append(f"{candidate} is newer and not whole, so it was passed over: {why}")
    raise UserError(
        f"{role}: {path} stands for the newest checkpoint in {folder}, which holds "
        + (f"none that is whole: {passed[0]}" if passed else "none")
    )


def _newest_first(folder: str) -> list[str]:
    """Its sub-folders that hold weights."""
    written: dict[str, float] = {}
    for name in open_store(folder).folders():
        store = open_store(inside(folder, name))
        weights = [file for file in store.files() if "/" not in file and file.endswith(".safetensors")]
        written |= {name: max(store.changed(file) for file in weights)} if weights else {}
    numbers = {name: tuple(map(int, re.findall(r"\d+", name))) for name in written}
    alike = len({re.sub(r"\d+", "0", name) for name in written}) == 1
    newest_first = sorted(written, key=lambda name: numbers[name] if alike else (written[name], name), reverse=True)
    return [inside(folder, name) for name in newest_first]


def _not_whole(path: str, role: str) -> str | None:
    """Why a folder does not hold a whole checkpoint. Trainers write the index after the files that it names."""
    try:
        checkpoint = open_checkpoint(path, role, plain_codes=True)
    except UserError as error:
        return str(error)
    if len(checkpoint.identity) > 1 and not any(name.endswith(INDEX_SUFFIX) for name in open_store(path).files()):
        return f"it has {len(checkpoint.identity)} files and no index yet"
    return None
