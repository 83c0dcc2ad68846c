"""Fields in the paths of a recipe, as in `pruned/{date}`: which there are, and what takes their place."""

from __future__ import annotations

import datetime
import glob
import string
from collections.abc import Callable, Mapping

TIMES = ("date", "time")
"""UTC, as 2026-11-25 and 021500; in every path."""
CHOICES = ("base", "finetuned", "method", "scope", "density")
"""In the output's path: the names of the folders of the inputs, and what was chosen."""


def times() -> dict[str, str]:
    """Values of `TIMES` now."""
    now = datetime.datetime.now(datetime.UTC)
    return {"date": f"{now:%Y-%m-%d}", "time": f"{now:%H%M%S}"}


def check(path: str, allowed: tuple[str, ...]) -> str:
    """The path itself.

    Raises:
        ValueError: it has a field that is not allowed, or a brace too many.
    """
    for _, field in _parse(path):
        if field is not None and field not in allowed:
            names = ", ".join(f"{{{name}}}" for name in allowed)
            raise ValueError(f"there is no field {{{field}}}; it may hold {names}, and {{{{ stands for a brace")
    return path


def literal(path: str) -> str:
    """A path without fields, written as one that may have some."""
    return path.replace("{", "{{").replace("}", "}}")


def changes(path: str) -> bool:
    """Whether a path reads otherwise at another time."""
    return any(field in TIMES for _, field in _parse(path))


def fill(path: str, values: Mapping[str, str]) -> str:
    """The path with the values of its fields."""
    return _join(path, values.__getitem__, str)


def as_glob(path: str, values: Mapping[str, str]) -> str:
    """A pattern of the paths that this one reads as, sooner or later; fields without a value match anything."""
    return _join(path, lambda field: glob.escape(values[field]) if field in values else "*", glob.escape)


def _join(path: str, value: Callable[[str], str], text: Callable[[str], str]) -> str:
    return "".join(text(before) + (value(field) if field is not None else "") for before, field in _parse(path))


def _parse(path: str) -> list[tuple[str, str | None]]:
    """The pieces of a path: text, and the field that follows it."""
    try:
        parsed = list(string.Formatter().parse(path))
    except ValueError:
        raise ValueError("a brace stands alone; write {{ or }} for a brace") from None
    pieces = []
    for text, field, spec, conversion in parsed:
        extra = ("!" + conversion if conversion else "") + (":" + spec if spec else "")
        pieces.append((text, field + extra if field is not None else None))
    return pieces
