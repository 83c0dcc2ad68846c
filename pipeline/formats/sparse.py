"""The sparse task vector of one tensor: where it differs from base, and what is there.

A tensor is cut into blocks of DELTA_BLOCK elements. Of each there are, one after the other in streams of bytes,

- the places: the gaps between them, a byte each (255 means that the next byte adds to it), or one bit an element, the
  lowest bit first, whichever is shorter;
- the values: elements of the output as they are stored, all their first bytes, then all their second bytes, and so on;
- where it is to be taken back without base, what base has there, likewise.

Each may be compressed with zstd. A table says of each block how many places it has, how its places are written and
how many bytes they and its values take: int64 (blocks, 6). The values are copied, not added: nothing is rounded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from fapm.errors import UserError
from fapm.formats.dtypes import convert, is_weight, itemsize
from fapm.formats.tensor import Part, Sides, TensorInfo

DELTA_BLOCK = 1 << 20
"""Elements."""

COLUMNS = 6
KEPT, HOW, PLAIN_BYTES, PLACE_BYTES, VALUE_BYTES, BEFORE_BYTES = range(COLUMNS)
"""Of the table: how many places; flags; bytes of the places, before they were compressed and as they are; of the
values; of what base has there."""

BITS, PACKED_PLACES, PACKED_VALUES, PACKED_BEFORE = 1, 2, 4, 8
"""Flags: a bit an element instead of gaps; compressed places; compressed values; compressed values of base."""

_LEVEL = 1  # of zstd: higher ones gain a percent or two


@functools.cache
def _codec() -> object:
    import pyarrow as pa

    return pa.Codec("zstd", compression_level=_LEVEL)


class Scratch:
    """Memory that is used again from block to block: fresh pages cost more than what is done with them."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def take(self, what: str, nbytes: int) -> np.ndarray:
        """uint8, of any content."""
        if what not in self._arrays or self._arrays[what].size < nbytes:
            self._arrays[what] = np.empty(nbytes, np.uint8)
        return self._arrays[what][:nbytes]

    def of(self, out: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For the gaps, the values and base's values of a block."""
        gaps = self.take("gaps", out.size + out.size // 255 + 1)
        values, before = (self.take(what, out.nbytes).view(out.dtype) for what in ("values", "before"))
        return gaps, values, before


def encode(
    base: np.ndarray, out: np.ndarray, compress: bool = True, reversible: bool = False, scratch: Scratch | None = None
) -> tuple[list[int], bytes, bytes, bytes]:
    """A block: its row of the table, its places, its values, and if it is `reversible` base's.

    Args:
        base, out: bits of the elements in the output's dtype, of one unsigned type, at most DELTA_BLOCK.
    """
    from fapm.formats.loops import changed

    gaps, values, before = (scratch or Scratch()).of(out)
    count, nbytes = changed(base, out, gaps, values, before)
    how, places = 0, gaps[:nbytes].tobytes()
    if nbytes > -(-out.size // 8):
        how, places = BITS, np.packbits(base != out, bitorder="little").tobytes()
    plain = len(places)
    taken, given = _shuffled(values[:count]), _shuffled(before[:count]) if reversible else b""
    if compress:
        places, how = _smaller(places, how, PACKED_PLACES)
        taken, how = _smaller(taken, how, PACKED_VALUES)
        given, how = _smaller(given, how, PACKED_BEFORE)
    return [count, how, plain, len(places), len(taken), len(given)], places, taken, given


def _shuffled(values: np.ndarray) -> bytes:
    return values.view(np.uint8).reshape(values.size, values.itemsize).T.tobytes()


def _smaller(data: bytes, how: int, flag: int) -> tuple[bytes, int]:
    packed = _codec().compress(data, asbytes=True) if data else data  # type: ignore[attr-defined]
    return (packed, how | flag) if len(packed) < len(data) else (data, how)


def check_table(
    table: np.ndarray, tensor: str, numel: int, width: int, places: int, values: int, where: str, before: int = 0
) -> None:
    """Refuse a table that does not fit its tensor, before anything is made of it.

    Args:
        places, values, before: bytes of the streams.

    Raises:
        UserError: it lies.
    """
    blocks = -(-numel // DELTA_BLOCK)
    if table.shape != (blocks, COLUMNS):
        raise UserError(f"{where}: the blocks of {tensor!r} are {table.shape[0]}, and it should have {blocks}")
    sizes = np.minimum(DELTA_BLOCK, numel - DELTA_BLOCK * np.arange(blocks))
    kept, how, plain, packed, valued, given = table.T if blocks else np.zeros((COLUMNS, 0), np.int64)
    in_bits = (how & BITS) > 0
    all_of = kept * width
    most = np.where(in_bits, -(-sizes // 8), kept + sizes // 255)
    fits = (
        ((kept >= 0) & (kept <= sizes)).all()
        and ((how >= 0) & (how < 16)).all()
        and ((plain >= np.where(in_bits, most, kept)) & (plain <= most)).all()
        and ((packed >= 0) & np.where(how & PACKED_PLACES, packed < plain, packed == plain)).all()
        and ((valued >= 0) & np.where(how & PACKED_VALUES, valued < all_of, valued == all_of)).all()
        and np.where(how & PACKED_BEFORE, (given > 0) & (given < all_of), (given == 0) | (given == all_of)).all()
        and (before == 0 or not (kept > 0)[given == 0].any())
        and int(given.sum()) == before
        and int(packed.sum()) == places
        and int(valued.sum()) == values
    )
    if not fits:
        raise UserError(f"{where}: the table of blocks of {tensor!r} does not fit its places and values")


@dataclass(frozen=True, slots=True)
class Patched:
    """A tensor of base, in another dtype perhaps, with what is written over it.

    Attributes:
        over: base's tensor.
        blocks, places, values: the table and the two streams; `before`, base's values at these places, if it has them.
        dtype: of the result.
        checksum: xxh3-128 of the result's bytes, in hexadecimal.
    """

    over: Part
    blocks: Part
    places: Part
    values: Part
    dtype: str
    checksum: str = ""
    before: Part | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.over, self.blocks, self.places, self.values, *((self.before,) if self.before else ())

    def fill(self, start: int, stop: int, out: np.ndarray, sides: Sides) -> None:
        write_over(self, start, stop, out, sides, self._write)

    def _write(self, number: int, begin: int, bits: np.ndarray, sides: Sides) -> None:
        from fapm.formats.loops import overwrite

        size = self._size(number)
        make = partial(self._stored, number, sides)
        # of a part the rest is wanted next
        written, values, in_bits = make() if bits.size == size else sides.remember((self, number), make)
        if not overwrite(written, bool(in_bits), values, size, bits, begin):
            raise self._damaged()

    def block(self, number: int, sides: Sides, of_base: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The places (int64, in order) and the values of one block, or base's values there.

        Raises:
            UserError: they are not what the table says.
        """
        from fapm.formats.loops import places as places_of

        written, values, in_bits = self._stored(number, sides, of_base)
        size, (width, kept) = self._size(number), values.shape
        if in_bits:
            places = np.flatnonzero(np.unpackbits(written, count=size, bitorder="little"))
            good = places.size == kept
        else:
            places = np.empty(kept, np.int64)
            good = places_of(written, places, size) == kept
        if not good:
            raise self._damaged()
        return places, np.ascontiguousarray(values.T).view(f"u{width}").reshape(kept)

    def _size(self, number: int) -> int:
        return min(DELTA_BLOCK, self.over.info.numel - number * DELTA_BLOCK)

    def _stored(self, number: int, sides: Sides, of_base: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A block's places as they are written, its values by their bytes (width, kept), whether a bit each element."""
        (table,) = sides.remember(
            (self, "table"), lambda: (sides.whole(self.blocks).view(np.int64).reshape(-1, COLUMNS),)
        )
        kept, how, plain, packed, *valued = table[number].tolist()
        before = table[:number].sum(0)
        at = int(before[PLACE_BYTES])
        written = sides.take(self.places, at, at + packed)
        if how & PACKED_PLACES:
            written = self._unpacked(written, plain)
        stream, column, flag = self.values, VALUE_BYTES, PACKED_VALUES
        if of_base:
            assert self.before
            stream, column, flag = self.before, BEFORE_BYTES, PACKED_BEFORE
        from_, width = int(before[column]), itemsize(self.dtype)
        values = sides.take(stream, from_, from_ + valued[column - VALUE_BYTES])
        if how & flag:
            values = self._unpacked(values, kept * width)
        return written, values.reshape(width, kept), np.array(how & BITS > 0)

    def _unpacked(self, data: np.ndarray, nbytes: int) -> np.ndarray:
        import pyarrow as pa

        try:
            return np.frombuffer(_codec().decompress(data, nbytes, asbytes=True), np.uint8)  # type: ignore[attr-defined]
        except (pa.ArrowException, OSError, ValueError):
            raise self._damaged() from None

    def _damaged(self) -> UserError:
        name = self.over.info.name
        return UserError(f"the sparse task vector of {name!r} in {self.places.info.file} is damaged; fetch it again")


def write_over(
    patched: Patched, start: int, stop: int, out: np.ndarray, sides: Sides,
    write: Callable[[int, int, np.ndarray, Sides], None],
) -> None:  # fmt: skip
    """base's elements `start` to `stop` in the dtype of the result, and over them what `write` has of each block: it
    gets a block's number, a place in it, and the bits of the elements from there on."""
    info, width = patched.over.info, itemsize(patched.dtype)
    before = itemsize(info.dtype)
    aligned = out.ctypes.data % width == 0
    bits = out.view(f"u{width}") if aligned else np.empty(stop - start, f"u{width}")
    if info.dtype == patched.dtype:
        sides.copy_into(patched.over, start * before, stop * before, bits.view(np.uint8))
    else:
        bits[:] = in_dtype(sides.take(patched.over, start * before, stop * before), info.dtype, patched.dtype)
    for number in range(start // DELTA_BLOCK, -(-stop // DELTA_BLOCK)):
        first = number * DELTA_BLOCK
        begin, end = max(start, first), min(stop, first + DELTA_BLOCK)
        write(number, begin - first, bits[begin - start : end - start], sides)
    if not aligned:
        out[:] = bits.view(np.uint8)


@dataclass(frozen=True, slots=True)
class Layered:
    """A tensor of base with several sparse task vectors written over it, one after the other.

    Attributes:
        layers: over the same tensor, in the same dtype.
        on_conflict: what counts where two write different values to one place: `first`, `last`, or `error`.
    """

    layers: tuple[Patched, ...]
    on_conflict: str

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(part for layer in self.layers for part in layer.parts)

    def fill(self, start: int, stop: int, out: np.ndarray, sides: Sides) -> None:
        first = self.layers[0]
        write_over(first, start, stop, out, sides, self._write)

    def _write(self, number: int, begin: int, bits: np.ndarray, sides: Sides) -> None:
        places, values = sides.remember((self, number), partial(self._block, number, sides))
        first, last = np.searchsorted(places, (begin, begin + bits.size))
        bits[places[first:last] - begin] = values[first:last]

    def _block(self, number: int, sides: Sides) -> tuple[np.ndarray, np.ndarray]:
        found = [layer.block(number, sides) for layer in self.layers]
        places = np.concatenate([places for places, _ in found])
        values = np.concatenate([values for _, values in found])
        order = np.argsort(places, kind="stable")
        places, values = places[order], values[order]
        again = places[1:] == places[:-1]
        if self.on_conflict == "error":
            conflicts = int(np.count_nonzero(again & (values[1:] != values[:-1])))
            if conflicts:
                raise UserError(
                    f"tensor {self.layers[0].over.info.name!r}: two sparse task vectors write different values to "
                    f"{conflicts:,} of the same places; --on-conflict first or last decides"
                )
        keep = np.append(True, ~again) if self.on_conflict == "first" else np.append(~again, True)
        return places[keep[: places.size]], values[keep[: values.size]]


def in_dtype(stored: np.ndarray, source: str, target: str) -> np.ndarray:
    """Bits of base's elements in the output's dtype; of what is not scored, the bits as they are."""
    if is_weight(source) and is_weight(target):
        return convert(stored, source, target)
    return stored.view(f"u{itemsize(target)}")


def fits(base: TensorInfo, dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of the output can be told by where it differs from base's."""
    alike = base.dtype == dtype or (is_weight(base.dtype) and is_weight(dtype))
    return base.shape == shape and alike and itemsize(dtype) in (1, 2, 4, 8) and itemsize(base.dtype) > 0
