"""Cutting a shard into what is read and worked on together.

A *section* is a run of tensors that is worked on together: the tensors of a group that lies in this shard, or a
batch of small tensors, or one large one. It is read in *pieces* of about PIECE_BYTES. A piece holds *slices*, each of
which becomes one chunk: a run of a tensor, or many small tensors side by side, so that none costs a call of its own.
Where a device computes, runs of large tensors come in pieces of their own size, and go there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fapm.formats.dtypes import itemsize
from fapm.formats.tensor import TensorInfo
from fapm.planning.plan import PairedTensor
from fapm.scoring.methods import BLOCK

CHUNK = 1 << 20
"""Elements handed to the arithmetic at once, at most; a multiple of its block."""

SMALL = BLOCK
"""Elements of a tensor that shares a chunk with others, at most."""

_TOGETHER = 1 << 18  # elements of small tensors in one chunk

PIECE_BYTES = 8 << 20
"""Input bytes read and held together."""

MOST_RANGES = 1 << 13
"""Ranges of files in a piece, so that the gaps of alignment stay small."""

ALIGN, ALIGN_SMALL = 64, 8  # the place in the buffer agrees with that in the file, so that aligned data stays it
LARGE = 1 << 14  # bytes of a range that is aligned to a cache line


def slack(nbytes: int) -> int:
    """Bytes that alignment takes of the buffer of a piece of `nbytes`."""
    return ALIGN * (nbytes // LARGE) + ALIGN_SMALL * MOST_RANGES


BATCH_BYTES = 32 << 20
"""Input bytes of a section of several groups."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements `start` to `stop` of one tensor; or several small tensors of the same dtypes and density, whole; or
    bytes `start` to `stop` of one source that pass through (`raw`).

    `at` is the place of the first tensor in its section.
    """

    tensors: tuple[PairedTensor, ...]
    at: int
    start: int
    stop: int
    raw: bool = False

    @property
    def sources(self) -> tuple[tuple[int, tuple[TensorInfo, ...]], ...]:
        """The stored tensors that it reads of each checkpoint, and its number: of base and all others, or of one."""
        if self.raw:
            number, info = self.tensors[0].sources[-1]
            return ((number, (info,)),)
        infos = zip(*((info for _, info in tensor.sources) for tensor in self.tensors), strict=True)
        return tuple(zip(self.numbers, infos, strict=True))

    @property
    def numbers(self) -> list[int]:
        """The checkpoints of which something is held, in the order of `sources`, of a slice that is not `raw`."""
        return [number for number, _ in self.tensors[0].sources]

    def of(self, tensors: Sequence[PairedTensor]) -> Slice:
        """The same with the tensors as somebody else's plan has them; `tensors` are the whole section's."""
        return replace(self, tensors=tuple(tensors[self.at : self.at + len(self.tensors)]))

    @property
    def nbytes(self) -> int:
        """Input bytes."""
        if self.raw:
            return self.stop - self.start
        return (self.stop - self.start) * sum(itemsize(info.dtype) for _, info in self.tensors[0].sources)

    @property
    def large(self) -> bool:
        """Whether it is a run of a tensor that a device takes, where there is one."""
        return not self.raw and self.tensors[0].common > SMALL


@dataclass(frozen=True, slots=True)
class Piece:
    """`on_device`: its slices are large, and go to the device."""

    slices: tuple[Slice, ...]
    nbytes: int
    on_device: bool = False


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large what is cut may be: elements of a chunk, its bytes in the output, input bytes of a piece and of a
    section of several groups."""

    chunk: int
    output_bytes: int
    piece_bytes: int
    batch_bytes: int


ON_HOST = Sizes(CHUNK, PIECE_BYTES, PIECE_BYTES, BATCH_BYTES)


@dataclass(frozen=True, slots=True)
class Section:
    tensors: tuple[PairedTensor, ...]
    pieces: tuple[Piece, ...]
    nbytes: int

    @property
    def on_host(self) -> list[Piece]:
        return [piece for piece in self.pieces if not piece.on_device]

    @property
    def on_device(self) -> list[Piece]:
        return [piece for piece in self.pieces if piece.on_device]


def sections(
    tensors: Sequence[PairedTensor],
    together: Sequence[str] = (),
    device: Sizes | None = None,
    kinds: Mapping[str, Any] | None = None,
) -> list[Section]:
    """Cut a shard's tensors. Those of each group in `together` end up in one section.

    Args:
        device: the sizes for what goes there, if there is one.
        kinds: what small tensors have to agree in to share a slice, by name; their own parameter by default.
    """
    wanted = set(together)
    last = {t.group: i for i, t in enumerate(tensors) if t.group in wanted}
    found: list[Section] = []
    batch: list[PairedTensor] = []
    until = nbytes = 0
    most = (device or ON_HOST).batch_bytes
    for i, tensor in enumerate(tensors):
        read_bytes = tensor.read_bytes
        if batch and i > until and nbytes + read_bytes > most:
            found.append(_section(batch, device, kinds or {}))
            batch, nbytes = [], 0
        batch.append(tensor)
        nbytes += read_bytes
        until = max(until, last.get(tensor.group, i))
    if batch:
        found.append(_section(batch, device, kinds or {}))
    return found


def _section(tensors: Sequence[PairedTensor], device: Sizes | None, kinds: Mapping[str, Any]) -> Section:
    pieces: list[Piece] = []
    here: list[Slice] = []
    size = ranges = 0
    on_device = False
    for part in _slices(tensors, device or ON_HOST, kinds):
        nbytes, count, there = (
            part.nbytes,
            len(part.tensors[0].sources) * len(part.tensors),
            device is not None and part.large,
        )
        most = device.piece_bytes if device and there else PIECE_BYTES
        if here and (there != on_device or size + nbytes > most or ranges + count > MOST_RANGES):
            pieces.append(Piece(tuple(here), size, on_device))
            here, size, ranges = [], 0, 0
        here.append(part)
        on_device = there
        size += nbytes
        ranges += count
    if here:
        pieces.append(Piece(tuple(here), size, on_device))
    return Section(tuple(tensors), tuple(pieces), sum(p.nbytes for p in pieces))


def _slices(tensors: Sequence[PairedTensor], sizes: Sizes, kinds: Mapping[str, Any]) -> Iterator[Slice]:
    """Small neighbours that are pruned and alike, together; of others the common elements, then what passes through."""
    first = numel = 0
    alike: tuple[object, ...] = ()

    def gathered(stop: int) -> Iterator[Slice]:
        if numel:
            yield Slice(tuple(tensors[first:stop]), first, 0, numel)

    for i, tensor in enumerate(tensors):
        if not (tensor.common == tensor.numel and 0 < tensor.common <= SMALL):
            yield from gathered(i)
            numel = 0
            yield from _cut(tensor, i, sizes)
            continue
        stored = ((number, info.dtype) for number, info in tensor.sources)
        kind = (*stored, tensor.dtype, kinds.get(tensor.name, (tensor.parameter, tensor.scale)))
        full = numel + tensor.common > _TOGETHER or i - first >= MOST_RANGES // 2
        if numel and (kind != alike or full):
            yield from gathered(i)
            numel = 0
        if not numel:
            first, alike = i, kind
        numel += tensor.common
    yield from gathered(len(tensors))


def _cut(tensor: PairedTensor, at: int, sizes: Sizes) -> Iterator[Slice]:
    if tensor.common:
        together = sum(itemsize(info.dtype) for _, info in tensor.sources)
        most = min(sizes.piece_bytes // together, sizes.output_bytes // itemsize(tensor.dtype))
        step = min(sizes.chunk, most // BLOCK * BLOCK)
        for start in range(0, tensor.common, step):
            yield Slice((tensor,), at, start, min(start + step, tensor.common))
    _, source = tensor.sources[-1]
    begin = tensor.common * itemsize(source.dtype) if tensor.common else 0
    step = CHUNK * max(1, itemsize(source.dtype))  # bytes; at most a piece, and a multiple of every width
    for start in range(begin, source.nbytes, step):
        yield Slice((tensor,), at, start, min(start + step, source.nbytes), raw=True)
