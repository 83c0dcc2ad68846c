"""JSON that a folder holds, checked before anything is done with it: the folder may be a stranger's.

A reader of such a file has a model of it (pydantic). What does not fit it is one sentence that says where.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fapm.errors import UserError
from fapm.storage.store import Store

MOST_BYTES = 16 << 20
_MOST_PARTS = 200_000

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Integer = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=4096)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]
FileName = Annotated[
    str, Field(max_length=1000, pattern=r"^([^/\x00-\x1f.][^/\x00-\x1f]*/)?[^/\x00-\x1f.][^/\x00-\x1f]*$")
]
"""A file of a folder, or of one in it; nothing hidden, and nothing that leads out."""
Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""xxh3-128."""


class Record(BaseModel):
    """Contents of a JSON file, as a model. What is not listed may be there too, of another version, and is not used."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, defer_build=True)


def parse(data: bytes, most_parts: int = _MOST_PARTS) -> Any:
    """A stranger's JSON, in memory that its size bounds.

    Args:
        most_parts: lists and objects that it may have; members, eight times as many.

    Raises:
        ValueError: it is none, or has more than that.
    """
    if data.count(b"[") + data.count(b"{") > most_parts or data.count(b",") > 8 * most_parts:
        raise ValueError("it has more parts than any")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested deeper than any") from None


def parse_finite(data: bytes, most_parts: int = _MOST_PARTS) -> Any:
    """The same where NaN and Infinity have no place, as in all that fapm writes."""
    if any(word in data for word in (b"NaN", b"Infinity")):
        json.loads(data, parse_constant=_refuse_constant)
    return parse(data, most_parts)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it has {name} where a number should be")


def read_record(
    folder: Store, name: str, model: type[Record], wrong: str, most_bytes: int = MOST_BYTES
) -> dict[str, Any]:
    """A file of a folder as a dictionary that fits a model.

    Args:
        wrong: what it is if it does not fit, and what to do: "damaged; start again with --overwrite".

    Raises:
        UserError: it does not fit.
    """
    size = folder.size(name)
    if size > most_bytes:
        raise UserError(f"{folder.at(name)} is {wrong} (it has {size} bytes)")
    return checked(folder.read(name), model, f"{folder.at(name)} is {wrong}")


def checked(data: bytes, model: type[Record], wrong: str, most_parts: int = _MOST_PARTS) -> dict[str, Any]:
    """Bytes as a dictionary that fits a model.

    Args:
        wrong: the sentence that is said if they do not.

    Raises:
        UserError: they do not.
    """
    try:
        loaded = parse_finite(data, most_parts)
        model.model_validate(loaded)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part)[:80] for part in first["loc"])
        raise UserError(f"{wrong} ({where + ': ' if where else ''}{first['msg'][:200]})") from None
    except ValueError as error:
        raise UserError(f"{wrong} ({str(error)[:200]})") from None
    assert isinstance(loaded, dict)
    return loaded
