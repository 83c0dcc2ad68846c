"""Loops of forms over every element, compiled, in IEEE order (`scoring.compiled`).

In a module of their own, so that who only wants to know what a checkpoint holds does not wait for the compiler.
"""

from __future__ import annotations

import numpy as np

from fapm.scoring.compiled import compiled


@compiled
def add_product(out, first, columns, left, right, scale):  # type: ignore[no-untyped-def]
    """out[i] += scale · Σ_k left[row, k]·right[k, column], for the elements of a matrix from the flat index `first`."""
    done = 0
    sums = np.empty(columns, np.float32)
    while done < out.size:
        row, begin = (first + done) // columns, (first + done) % columns
        end = min(columns, begin + out.size - done)
        sums[: end - begin] = 0
        for k in range(right.shape[0]):
            factor = left[row, k]
            for j in range(end - begin):
                sums[j] += factor * right[k, begin + j]
        for j in range(end - begin):
            out[done + j] += scale * sums[j]
        done += end - begin


@compiled
def add_squares(sums, first, columns, elements, by_column):  # type: ignore[no-untyped-def]
    """Add the squares of a matrix's elements from the flat index `first` on to the sum of their row or column."""
    for i in range(elements.size):
        at = (first + i) % columns if by_column else (first + i) // columns
        value = np.float64(elements[i])
        sums[at] += value * value


@compiled
def multiply(out, first, columns, factors, by_column):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        out[i] *= factors[(first + i) % columns if by_column else (first + i) // columns]


@compiled
def scale(out, codes, first, columns, table, scales, rows_a_block, columns_a_block, across):  # type: ignore[no-untyped-def]
    """out[i] = table[codes[i]] · the scale of its block, from the flat index `first` on."""
    for i in range(out.size):
        row, column = (first + i) // columns, (first + i) % columns
        out[i] = table[codes[i]] * scales[row // rows_a_block * across + column // columns_a_block]


@compiled
def unpack(out, blocks, scales, values, groups):  # type: ignore[no-untyped-def]
    """out (columns, rows) from blocks (rows, groups, 16) of two codes a byte, the lower half first."""
    for row in range(out.shape[1]):
        for group in range(groups):
            scale = scales[row * groups + group]
            for i in range(16):
                byte = blocks[(row * groups + group) * 16 + i]
                out[group * 32 + 2 * i, row] = values[byte & 15] * scale
                out[group * 32 + 2 * i + 1, row] = values[byte >> 4] * scale


@compiled
def round_to_bfloat16(bits, out):  # type: ignore[no-untyped-def]
    """The bits of float32 values rounded to nearest even in bfloat16; NaN stays one. torch's call for so few
    elements waits longer for its threads than it computes."""
    for i in range(bits.size):
        code = bits[i]
        if code & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
            out[i] = 0x7FC0
        else:
            out[i] = (code + np.uint32(0x7FFF) + ((code >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@compiled
def _differing(base, out, found):  # type: ignore[no-untyped-def]
    """Where two arrays differ, into `found`, one longer than them; without a branch, which could not be foretold."""
    count = np.uint64(0)
    for i in range(out.size):
        found[count] = i
        count += np.uint64(base[i] != out[i])
    return np.int64(count)


@compiled
def changed(base, out, gaps, values, before):  # type: ignore[no-untyped-def]
    """Where two arrays of bits differ: the gaps between those places, a byte each (255 and another byte, and so on,
    where they are longer), and what is there in `out` and in `base`. Returns how many places and how many bytes."""
    count, nbytes, last = 0, 0, -1
    found = np.empty(4097, np.uint32)
    for start in range(0, out.size, 4096):
        for k in range(_differing(base[start : start + 4096], out[start : start + 4096], found)):
            at = start + int(found[k])
            gap = at - last - 1
            while gap >= 255:
                gaps[nbytes] = 255
                nbytes += 1
                gap -= 255
            gaps[nbytes] = gap
            nbytes += 1
            values[count] = out[at]
            before[count] = base[at]
            count += 1
            last = at
    return count, nbytes


@compiled
def places(gaps, found, size):  # type: ignore[no-untyped-def]
    """The places (uint32) that gaps stand for, all below `size`. Returns how many, or −1 if the gaps are not whole, say
    more places than `found` has room for, or lead out."""
    count, at, gap = 0, -1, 0
    for i in range(gaps.size):
        gap += gaps[i]
        if gap > size:
            return -1
        if gaps[i] == 255:
            continue
        at += gap + 1
        gap = 0
        if at >= size or count >= found.size:
            return -1
        found[count] = at
        count += 1
    return -1 if gaps.size and gaps[-1] == 255 else count


@compiled
def overwrite(written, in_bits, values, size, out, begin):  # type: ignore[no-untyped-def]
    """Write the values of a block of `size` elements over those from its place `begin` on, as far as `out` reaches.

    Args:
        written: its gaps, or a bit an element if `in_bits`.
        values: uint8 (width, places).
        out: bits of elements.

    Returns:
        Whether the places are as many as the values, and all in the block.
    """
    width, kept = values.shape
    count, at, end = 0, 0, begin + out.size
    for i in range(written.size):
        byte = written[i]
        if in_bits:
            at = 8 * i
        else:
            at += byte
            byte = np.uint8(byte < 255)
        while byte:
            if byte & 1:
                if count == kept or at >= size:
                    return False
                if begin <= at < end:
                    value = np.uint64(values[0, count])
                    for k in range(1, width):
                        value |= np.uint64(values[k, count]) << np.uint64(8 * k)
                    out[at - begin] = value
                count += 1
            byte >>= 1
            at += 1
    return count == kept and (in_bits or written.size == 0 or written[-1] < 255)
