"""The newest checkpoint of a folder, for paths like `runs/latest`."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.errors import UserError
from pipeline.formats.checkpoint import INDEX_SUFFIX, open_checkpoint
from pipeline.storage.local import Folder, plain_errors

LATEST = "latest"


def newest(path: str, role: str) -> tuple[str, tuple[str, ...]]:
    """What `FOLDER/latest` stands for where nothing of that name is there: the newest whole checkpoint in FOLDER.

    Newest is the one with the highest number where the names differ in their numbers alone (checkpoint-500 and
    checkpoint-1000), else the one whose weights were written last. One that is not whole, perhaps because it is still
    being written, is passed over.

    Returns:
        The path itself, or the newest checkpoint's and a sentence for each that was passed over.

    Raises:
        UserError: the folder holds no whole checkpoint.
    """
    latest = Path(path)
    if latest.name != LATEST or latest.exists() or not latest.parent.is_dir():
        return path, ()
    passed: list[str] = []
    for candidate in _newest_first(latest.parent):
        why = _not_whole(candidate, role)
        if why is None:
            return str(candidate), tuple(passed)
        passed.append(f"{candidate} is newer and not whole, so it was passed over: {why}")
    raise UserError(
        f"{role}: {path} stands for the newest checkpoint in {latest.parent}, which holds "
        + (f"none that is whole: {passed[0]}" if passed else "none")
    )


def _newest_first(folder: Path) -> list[Path]:
    """Its sub-folders that hold weights."""
    written: dict[Path, int] = {}
    with plain_errors(folder):
        for path in folder.iterdir():
            if path.is_dir() and not path.name.startswith("."):
                times = [file.stat().st_mtime_ns for file in path.glob("*.safetensors")]
                written |= {path: max(times)} if times else {}
    numbers = {path: tuple(map(int, re.findall(r"\d+", path.name))) for path in written}
    if len({re.sub(r"\d+", "0", path.name) for path in written}) == 1:
        return sorted(written, key=lambda path: numbers[path], reverse=True)
    return sorted(written, key=lambda path: (written[path], path.name), reverse=True)


def _not_whole(path: Path, role: str) -> str | None:
    """Why a folder does not hold a whole checkpoint. Trainers write the index after the files that it names."""
    try:
        checkpoint = open_checkpoint(str(path), role)
    except UserError as error:
        return str(error)
    if len(checkpoint.identity) > 1 and not any(name.endswith(INDEX_SUFFIX) for name in Folder(path).files()):
        return f"it has {len(checkpoint.identity)} files and no index yet"
    return None
