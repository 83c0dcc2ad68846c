"""Reading: a shard's inputs, cut into pieces that are read ahead of the arithmetic, within a memory budget.

A *section* is a run of tensors that is worked on together: the tensors of a group that lies in this shard, or a
batch of small tensors, or one large one. Its bytes are cut into *pieces* of about PIECE_BYTES. A section that fits the
budget is resident: each piece is read once, and every pass over it finds it in memory. One that does not
is streamed: every pass reads the pieces again, two at a time. The arithmetic cannot tell.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.formats.dtypes import itemsize
from pipeline.formats.header import TensorInfo
from pipeline.plan import PairedTensor, Shard
from pipeline.scoring.methods import BLOCK
from pipeline.storage.local import Folder

CHUNK = 1 << 20
"""Elements handed to the arithmetic at once, at most; a multiple of its block."""

PIECE_BYTES = 8 << 20
"""Input bytes read and held together."""

_ALIGN = 64
_MOST_SLICES = 512  # in a piece, so that the gaps of alignment stay small
BUFFER_BYTES = PIECE_BYTES + 4 * _ALIGN * _MOST_SLICES
_FEWEST = 2  # buffers that streaming needs: one in use, one being read
BATCH_BYTES = 32 << 20
OVERHEAD_BYTES = 48 << 20
"""What a worker needs beside its input buffers: output buffers, histograms, a chunk's temporaries."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements `start` to `stop` of a tensor, or, where `stop` is past what is pruned, bytes that pass through.

    `raw` slices hold bytes of one source, from `start` to `stop` in bytes.
    """

    tensor: PairedTensor
    start: int
    stop: int
    raw: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    slices: tuple[Slice, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Section:
    tensors: tuple[PairedTensor, ...]
    pieces: tuple[Piece, ...]
    nbytes: int


def sections(shard: Shard, together: Sequence[str] = ()) -> list[Section]:
    """Cut a shard. The tensors of each group in `together` end up in one section."""
    last = {t.group: i for i, t in enumerate(shard.tensors) if t.group in set(together)}
    found: list[Section] = []
    batch: list[PairedTensor] = []
    until = nbytes = 0
    for i, tensor in enumerate(shard.tensors):
        if batch and i > until and nbytes + tensor.read_bytes > BATCH_BYTES:
            found.append(_section(batch))
            batch, nbytes = [], 0
        batch.append(tensor)
        nbytes += tensor.read_bytes
        until = max(until, last.get(tensor.group, i))
    if batch:
        found.append(_section(batch))
    return found


def _section(tensors: Sequence[PairedTensor]) -> Section:
    pieces: list[Piece] = []
    here: list[Slice] = []
    size = 0
    for tensor in tensors:
        for piece in _slices(tensor):
            nbytes = sum(length for _, _, length in extents(piece))
            if here and (size + nbytes > PIECE_BYTES or len(here) == _MOST_SLICES):
                pieces.append(Piece(tuple(here), size))
                here, size = [], 0
            here.append(piece)
            size += nbytes
    if here:
        pieces.append(Piece(tuple(here), size))
    return Section(tuple(tensors), tuple(pieces), sum(p.nbytes for p in pieces))


def _slices(tensor: PairedTensor) -> Iterator[Slice]:
    """The common elements of both sides, then the bytes that pass through."""
    together = sum(itemsize(s.dtype) for s in tensor.sources) if tensor.common else 1
    step = min(CHUNK, PIECE_BYTES // together // BLOCK * BLOCK)
    for start in range(0, tensor.common, step):
        yield Slice(tensor, start, min(start + step, tensor.common))
    source = tensor.sources[-1]
    begin = tensor.common * itemsize(source.dtype) if tensor.common else 0
    step = CHUNK * max(1, itemsize(source.dtype))  # bytes; at most a piece, and a multiple of every width
    for start in range(begin, source.nbytes, step):
        yield Slice(tensor, start, min(start + step, source.nbytes), raw=True)


def extents(piece: Slice) -> list[tuple[int, TensorInfo, int]]:
    """(first byte in the tensor, tensor, bytes) of what a slice reads: base then finetuned, or the one source."""
    if piece.raw:
        return [(piece.start, piece.tensor.sources[-1], piece.stop - piece.start)]
    return [
        (piece.start * itemsize(s.dtype), s, (piece.stop - piece.start) * itemsize(s.dtype))
        for s in piece.tensor.sources
    ]


class Memory:
    """Buffers of one size within a budget of bytes. Those given back are used again: fresh pages cost ten reads.

    For one thread: buffers are taken and given back by the one that computes.
    """

    def __init__(self, budget: int):
        self._left = max(_FEWEST, budget // BUFFER_BYTES)
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
    """A piece in memory: for every slice the bytes of its sources, in the order of `extents`."""

    piece: Piece
    views: list[list[np.ndarray]]


class Load(NamedTuple):
    """A piece on its way into memory."""

    future: Future[Loaded]
    buffer: mmap.mmap


class SectionReader:
    """Reads pieces on threads of its own, ahead of the one that computes.

    Args:
        folders: where the tensors lie: base's, finetuned's.
        memory: the worker's budget.
        threads: reads under way at once.
    """

    def __init__(self, base: Folder, finetuned: Folder, memory: Memory, threads: int = 2):
        self._base, self._finetuned = base, finetuned
        self.memory = memory
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self.bytes_read = 0

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def start(self, section: Section) -> list[Load] | None:
        """Begin to read a whole section, or say None if there is no room for it now."""
        if len(section.pieces) > self.memory.room - _FEWEST:
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
        whole = np.frombuffer(buffer, np.uint8)
        wanted = []
        for i, part in enumerate(piece.slices):
            for j, (first, tensor, nbytes) in enumerate(extents(part)):
                side = self._side(part.tensor, tensor)
                wanted.append((side is self._finetuned, tensor.file, tensor.offset + first, nbytes, i, j, side))
        wanted.sort(key=lambda w: w[:3])
        views: dict[tuple[int, int], np.ndarray] = {}
        position = 0
        runs: list[tuple[Folder, str, int, int, int]] = []  # folder, file, offset, place in the buffer, bytes
        for _, file, offset, nbytes, i, j, side in wanted:
            if runs and runs[-1][0] is side and runs[-1][1] == file and runs[-1][2] + runs[-1][4] == offset:
                runs[-1] = (*runs[-1][:4], runs[-1][4] + nbytes)
            else:
                position += -position % _ALIGN + offset % _ALIGN  # data aligned in the file is aligned here
                runs.append((side, file, offset, position, nbytes))
            views[i, j] = whole[position : position + nbytes]
            position += nbytes
        for folder, file, offset, place, nbytes in runs:
            folder.reader(file).read_into(offset, whole[place : place + nbytes])
            self.bytes_read += nbytes
        parts = enumerate(piece.slices)
        return Loaded(piece, [[views[i, j] for j in range(len(extents(part)))] for i, part in parts])

    def _side(self, paired: PairedTensor, tensor: TensorInfo) -> Folder:
        return self._base if tensor is paired.base else self._finetuned

    def read_runs(self, tensor: PairedTensor, starts: np.ndarray, length: int) -> list[np.ndarray]:
        """Bytes of short runs of elements, base's and finetuned's, without loading the tensor."""
        sides = []
        for source in tensor.sources:
            reader = self._side(tensor, source).reader(source.file)
            width = itemsize(source.dtype)
            target = np.empty((len(starts), length * width), np.uint8)
            for row, start in enumerate(starts.tolist()):
                reader.read_into(source.offset + start * width, target[row])
            self.bytes_read += target.nbytes
            sides.append(target.reshape(-1))
        return sides
