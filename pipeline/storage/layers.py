"""Several folders as one that is only read: files of the first are 0/NAME, those of the second 1/NAME, and so on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from fapm.errors import UserError
from fapm.storage.store import FileStat, Reader, Store


class Layers:
    """A `Store` of others.

    Args:
        address: of all of them.
    """

    writing_bytes = 0

    def __init__(self, address: str, parts: Sequence[Store]):
        self.address, self.parts = address, tuple(parts)
        self.reads_at_once = max(part.reads_at_once for part in parts)

    def __reduce__(self) -> tuple[type[Layers], tuple[str, tuple[Store, ...]]]:
        return Layers, (self.address, self.parts)

    def _of(self, name: str) -> tuple[Store, str]:
        number, _, rest = name.partition("/")
        if not number.isdecimal() or int(number) >= len(self.parts) or not rest:
            raise UserError(f"{self.address}: there is no {name!r}")
        return self.parts[int(number)], rest

    def at(self, name: str) -> str:
        part, rest = self._of(name)
        return part.at(rest)

    def absolute(self) -> Layers:
        return self  # its address is

    def exists(self) -> bool:
        return all(part.exists() for part in self.parts)

    def is_empty(self) -> bool:
        return all(part.is_empty() for part in self.parts)

    def is_file(self) -> bool:
        return any(part.is_file() for part in self.parts)

    def leads_out(self, name: str) -> bool:
        part, rest = self._of(name)
        return part.leads_out(rest)

    def links(self) -> list[str]:
        return [f"{i}/{name}" for i, part in enumerate(self.parts) for name in part.links()]

    def overlaps(self, other: Store) -> str:
        return next((found for part in self.parts if (found := part.overlaps(other))), "")

    def files(self, under: str = "") -> dict[str, FileStat]:
        found = {f"{i}/{name}": stat for i, part in enumerate(self.parts) for name, stat in part.files().items()}
        return {name: stat for name, stat in found.items() if not under or name.startswith(f"{under}/")}

    def folders(self) -> list[str]:
        return [str(i) for i in range(len(self.parts))]

    def has(self, name: str) -> bool:
        number, _, rest = name.partition("/")
        return bool(rest) and number.isdecimal() and int(number) < len(self.parts) and self._of(name)[0].has(rest)

    def has_folder(self, name: str) -> bool:
        return bool(self.files(name))

    def size(self, name: str) -> int:
        part, rest = self._of(name)
        return part.size(rest)

    @property
    def local_path(self) -> None:
        return None

    def is_here(self, name: str) -> bool:
        part, rest = self._of(name)
        return part.is_here(rest)

    def changed(self, name: str) -> float:
        part, rest = self._of(name)
        return part.changed(rest)

    def reader(self, name: str) -> Reader:
        part, rest = self._of(name)
        return part.reader(rest)

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def read(self, name: str) -> bytes:
        part, rest = self._of(name)
        return part.read(rest)

    def refuse(self, *_: Any) -> NoReturn:
        raise UserError(f"{self.address}: several folders at once are only read")

    write = write_private = append = create = remove = remove_folder = free_bytes = refuse
