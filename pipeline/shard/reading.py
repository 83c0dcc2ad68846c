"""Reading: a section's pieces, ahead of the arithmetic and within a memory budget.

A section that fits the budget is resident: each piece is read once, and every pass over it finds it in memory. One that
does not is streamed: every pass reads the pieces again, two at a time. The arithmetic cannot tell.
"""

from __future__ import annotations

import itertools
import mmap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.formats.dtypes import itemsize
from pipeline.plan import PairedTensor
from pipeline.shard.section import MOST_RANGES, PIECE_BYTES, Piece, Section, Slice
from pipeline.storage.local import Folder

_ALIGN, _ALIGN_SMALL = 64, 8  # the place in the buffer agrees with that in the file, so that aligned data stays it
_LARGE = 1 << 14  # bytes of a range that is aligned to a cache line
BUFFER_BYTES = PIECE_BYTES + _ALIGN * (PIECE_BYTES // _LARGE) + _ALIGN_SMALL * MOST_RANGES
_FEWEST = 2  # buffers that streaming needs: one in use, one being read
OVERHEAD_BYTES = 48 << 20
"""What a worker needs beside its input buffers: output buffers, histograms, a chunk's temporaries."""

ENOUGH_BYTES = 384 << 20
"""Input buffers, at most, whatever the budget. To read a file again from the system's cache costs less than the first
touch of fresh memory: a pair of 3 GB in one tensor takes 4 s by three readings and 6.5 s in memory of its own."""


class Memory:
    """Buffers of one size within a budget of bytes. Those given back are used again: fresh pages cost ten reads.

    For one thread: buffers are taken and given back by the one that computes.
    """

    def __init__(self, budget: int):
        self._left = max(_FEWEST, min(budget, ENOUGH_BYTES) // BUFFER_BYTES)
        self._free: list[mmap.mmap] = []

    @property
    def room(self) -> int:
        """How many buffers can be taken now."""
        return self._left + len(self._free)

    def take(self) -> mmap.mmap:
        """A buffer of BUFFER_BYTES; there must be room for it."""
        if self._free:
            return self._free.pop()
        assert self._left, "no room"
        self._left -= 1
        return mmap.mmap(-1, BUFFER_BYTES)

    def give(self, buffer: mmap.mmap) -> None:
        self._free.append(buffer)


@dataclass
class Loaded:
    """A piece in memory: for every slice the bytes of its sides, in the order of `Slice.sources`; and what it took."""

    piece: Piece
    views: list[list[np.ndarray]]
    seconds: float


class Load(NamedTuple):
    """A piece on its way into memory."""

    future: Future[Loaded]
    buffer: mmap.mmap


class SectionReader:
    """Reads pieces on threads of its own, ahead of the one that computes.

    `bytes_read` counts what that one has used, or thrown away; `seconds` how long the threads took for it.

    Args:
        folders: where the tensors lie: base's, finetuned's.
        memory: the worker's budget.
        threads: reads under way at once.
    """

    def __init__(self, base: Folder, finetuned: Folder, memory: Memory, threads: int = 2):
        self._folders = base, finetuned
        self.memory = memory
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self.bytes_read = 0
        self.seconds = 0.0

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def fits(self, section: Section) -> bool:
        """Whether there is room for a whole section now."""
        return len(section.pieces) <= self.memory.room - _FEWEST

    def start(self, section: Section) -> list[Load] | None:
        """Begin to read a whole section, or say None if there is no room for it now."""
        if not self.fits(section):
            return None
        return [self._submit(piece) for piece in section.pieces]

    def _submit(self, piece: Piece) -> Load:
        buffer = self.memory.take()
        return Load(self._threads.submit(self._load, piece, buffer), buffer)

    def release(self, loads: Sequence[Load]) -> None:
        """Give a section's buffers back, once nothing writes to them any more."""
        wait([load.future for load in loads])
        for load in loads:
            self.memory.give(load.buffer)
            if not load.future.exception():
                loaded = load.future.result()
                self.bytes_read += loaded.piece.nbytes
                self.seconds += loaded.seconds

    def stream(self, pieces: Sequence[Piece]) -> Iterator[Loaded]:
        """One pass over pieces that do not all fit: the next is read while one is used."""
        ahead: list[Load] = []
        waiting = list(reversed(pieces))
        try:
            while waiting or ahead:
                while waiting and len(ahead) < _FEWEST:
                    ahead.append(self._submit(waiting.pop()))
                yield ahead[0].future.result()
                self.release([ahead.pop(0)])
        finally:
            self.release(ahead)

    def _load(self, piece: Piece, buffer: mmap.mmap) -> Loaded:
        """Read a piece, neighbouring bytes of a file in one go."""
        began = time.perf_counter()
        whole = np.frombuffer(buffer, np.uint8)
        ranges: list[tuple[bool, str, int, int, int]] = []  # finetuned's, file, offset, bytes, number
        for part in piece.slices:
            for side in part.sources:
                many = len(side) > 1
                of_finetuned = part.tensors[0].base is not side[0]
                for source in side:
                    width = 1 if part.raw or many else itemsize(source.dtype)
                    begin, end = (0, source.nbytes) if many else (part.start * width, part.stop * width)
                    ranges.append((of_finetuned, source.file, source.offset + begin, end - begin, len(ranges)))
        places = [0] * len(ranges)
        position = 0
        runs: list[tuple[bool, str, int, int, int]] = []  # finetuned's, file, offset, bytes, place in the buffer
        for of_finetuned, file, offset, nbytes, number in sorted(ranges):
            if runs and runs[-1][:2] == (of_finetuned, file) and runs[-1][2] + runs[-1][3] == offset:
                runs[-1] = (of_finetuned, file, runs[-1][2], runs[-1][3] + nbytes, runs[-1][4])
            else:
                position += (offset - position) % (_ALIGN if nbytes >= _LARGE else _ALIGN_SMALL)
                runs.append((of_finetuned, file, offset, nbytes, position))
            places[number] = position
            position += nbytes
        for of_finetuned, file, offset, nbytes, place in runs:
            self._folders[of_finetuned].reader(file).read_into(offset, whole[place : place + nbytes])
        views: list[list[np.ndarray]] = []
        number = 0
        for part in piece.slices:
            views.append([])
            for side in part.sources:
                spans = [(places[i], ranges[i][3]) for i in range(number, number + len(side))]
                views[-1].append(_side_by_side(whole, spans))
                number += len(side)
        return Loaded(piece, views, time.perf_counter() - began)

    def read_runs(self, tensor: PairedTensor, starts: np.ndarray, length: int) -> list[np.ndarray]:
        """Bytes of short runs of elements, base's and finetuned's, without loading the tensor."""
        sides, began = [], time.perf_counter()
        for source in tensor.sources:
            reader = self._folders[source is not tensor.base].reader(source.file)
            width = itemsize(source.dtype)
            target = np.empty((len(starts), length * width), np.uint8)
            reader.read_rows((source.offset + starts * width).tolist(), target)
            self.bytes_read += target.nbytes
            sides.append(target.reshape(-1))
        self.seconds += time.perf_counter() - began
        return sides


def _side_by_side(whole: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """The bytes of spans (place, length), one after the other: where they lie like that, without a copy."""
    first, last = spans[0], spans[-1]
    if all(place + nbytes == following for (place, nbytes), (following, _) in itertools.pairwise(spans)):
        return whole[first[0] : last[0] + last[1]]
    return np.concatenate([whole[place : place + nbytes] for place, nbytes in spans])


class Pieces:
    """A section's pieces, as often as they are asked for: from memory if it is resident, else read again."""

    def __init__(self, reader: SectionReader, section: Section, loads: list[Load] | None):
        self.reader, self.section, self._loads = reader, section, loads
        self._parts: dict[str, list[tuple[Slice, list[np.ndarray]]]] | None = None

    @property
    def resident(self) -> bool:
        return self._loads is not None

    def __iter__(self) -> Iterator[Loaded]:
        if self._loads is None:
            return self.reader.stream(self.section.pieces)
        return (load.future.result() for load in self._loads)

    def parts(self, tensor: PairedTensor) -> list[tuple[Slice, list[np.ndarray]]]:
        """The slices that hold a pruned tensor's elements alone, if they are in memory, else none."""
        if self._parts is None:
            self._parts = {}
            for loaded in self if self.resident else ():
                for part, views in zip(loaded.piece.slices, loaded.views, strict=True):
                    if not part.raw and len(part.tensors) == 1:
                        self._parts.setdefault(part.tensors[0].name, []).append((part, views))
        return self._parts.get(tensor.name, [])
