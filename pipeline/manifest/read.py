"""The files of a run, read strictly: they may be damaged, or a stranger's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from fapm.errors import UserError
from fapm.formats.sandbox import RefusedError, ask
from fapm.layout import MANIFEST, RUN, table_name
from fapm.recipe import Recipe
from fapm.schemas import ROWS, ManifestRecord, Row
from fapm.storage.address import open_store
from fapm.storage.records import Record, read_record
from fapm.storage.store import Store

_MOST_TABLE_BYTES, _MOST_ROWS = 64 << 20, 200_000


def read_run_file(folder: Store, name: str, model: type[Record]) -> dict[str, Any]:
    """One of the JSON files that a run goes on from.

    Raises:
        UserError: it is damaged.
    """
    return read_record(folder, name, model, "damaged; start again with --overwrite")


def load_manifest(path: str) -> dict[str, Any]:
    """The manifest of a finished run.

    Raises:
        UserError: the folder holds no finished run.
    """
    folder = open_store(path)
    if not folder.exists():
        raise UserError(f"there is no folder {path}")
    if not folder.has(MANIFEST):
        state = "an unfinished run; give the same command again to go on" if folder.has(RUN) else "no output of fapm"
        raise UserError(f"{path} holds {state}")
    made = read_record(folder, MANIFEST, ManifestRecord, "not the manifest of a run that this version knows")
    try:
        recipe_of(made, "-", ["-"] * max(1, len(made.get("sources", ()))), "-")
    except UserError as error:
        raise UserError(f"{folder.at(MANIFEST)} is not the manifest of a run: its recipe has {error}") from None
    return made


def recipe_of(made: dict[str, Any], base: str, finetuned: Sequence[str], out: str) -> Recipe:
    """The recipe of a run by its manifest, which has no paths of its own.

    Raises:
        UserError: it is none.
    """
    known = {name: value for name, value in made["recipe"].items() if name in Recipe.model_fields}
    merged = known.pop("merged", None) or []
    if merged:
        if not isinstance(merged, list) or len(merged) != len(finetuned):
            raise UserError(f"{len(finetuned)} source(s) of a merge and not as many in its recipe")
        known["merged"] = [{**dict(of), "finetuned": path} for of, path in zip(merged, finetuned, strict=True)]
    return Recipe.of(**known | {"base": base, "finetuned": finetuned[0], "out": out})


def read_table(path: str, source: int = 0) -> list[dict[str, Any]]:
    """The rows of a finished run's table, of which each has what `schemas.Row` says.

    Args:
        source: of a merge the number of one of its sources, whose table it is to be.

    Raises:
        UserError: it is damaged, or none.
    """
    folder, name = open_store(path), table_name(source)
    if folder.size(name) > _MOST_TABLE_BYTES:
        raise UserError(f"{folder.at(name)} is larger than any table of tensors")
    try:
        answer = ask("untable.py", [str(_MOST_ROWS), *Row.model_fields], folder.read(name), 60, 256 << 20)
        found: list[dict[str, Any]] = []
        for line in answer.splitlines():
            found += (row.model_dump() for row in ROWS.validate_json(line))
    except (RefusedError, ValidationError) as error:
        why = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else error
        raise UserError(f"{folder.at(name)} is not the table of a run ({why})") from None
    return found
