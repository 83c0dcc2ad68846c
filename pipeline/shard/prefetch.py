"""Prefetch: the sections of a shard one after the other, the next one read while one is worked on.

After the last one the first of the task that will probably follow is read, while this shard is made durable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from fapm.planning.plan import Shard
from fapm.shard.cutting import Cut, HowToCut
from fapm.shard.reading import NOTHING, Held, Pieces, SectionReader
from fapm.shard.section import Section
from fapm.shard.task import Task


class _Ahead(NamedTuple):
    """A task that has not been given yet: what it will work through, and its first section on its way into memory."""

    how: HowToCut
    shard: int
    round: int
    sections: list[Section]
    held: Held


class Prefetch:
    """Reads ahead for one worker.

    Args:
        cut: makes sections.
    """

    def __init__(self, reader: SectionReader, cut: Callable[[Cut], list[Section]]):
        self._reader, self._cut = reader, cut
        self._ahead: _Ahead | None = None

    def has_begun(self, shard: Shard) -> bool:
        """Whether a part of a shard is being read already."""
        return self._ahead is not None and self._ahead.shard == shard.index

    def sections(self, how: HowToCut, task: Task, following: Task | None, keep: bool = False) -> Iterator[Pieces]:
        """Sections that a step works through.

        Args:
            keep: the step after this one needs the same once more.
        """
        ahead, self._ahead = self._ahead, None
        if ahead and ahead[:3] == (how, task.shard.index, task.round):
            found, first = ahead.sections, ahead.held
        else:
            self._let_go(ahead)
            found, first = self._cut(how(task)), NOTHING
        held = [first, *[NOTHING] * len(found)]

        def start(i: int) -> None:
            if i < len(found):
                held[i] = self._reader.start(found[i], held[i])

        def release(i: int, keep: bool = False) -> None:
            taken, held[i] = held[i], NOTHING
            self._reader.release(taken, found[i], keep)

        try:
            for i, section in enumerate(found):
                start(i)
                start(i + 1)
                if i + 1 == len(found) and following:
                    self._read_ahead(how, following)
                yield Pieces(self._reader, section, held[i])
                release(i, keep)
        except BaseException:
            for i in range(len(found)):
                release(i)
            self.forget()
            raise

    def _read_ahead(self, how: HowToCut, task: Task) -> None:
        """Begin with the task that will probably be next, if there is room for its first section."""
        found = self._cut(how(task))
        if found and self._reader.fits(found[0]):
            self._ahead = _Ahead(how, task.shard.index, task.round, found, self._reader.start(found[0]))

    def forget(self) -> None:
        """Throw away what was read for a task that is not the next one."""
        ahead, self._ahead = self._ahead, None
        self._let_go(ahead)

    def _let_go(self, ahead: _Ahead | None) -> None:
        if ahead:
            self._reader.release(ahead.held, ahead.sections[0])
