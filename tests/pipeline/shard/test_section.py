"""pytest tests/pipeline/shard/test_section.py: every byte of a shard is read once, whatever is cut how."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import bytes_of, raw_tensors
from hypothesis import given
from hypothesis import strategies as st

from fapm import Recipe
from fapm.formats.tensor import TensorInfo
from fapm.planning.make import make_plan
from fapm.planning.plan import PairedTensor
from fapm.shard import section
from fapm.shard.reading import BUFFER_BYTES, NOTHING, Pieces, SectionReader
from fapm.shard.section import MOST_RANGES, PIECE_BYTES, SMALL, sections
from fapm.storage.local import Folder

WIDTHS = {"BF16": 2, "F32": 4, "F64": 8}


def tensor(name: str, numel: int, dtype: str, common: int, group: str, density: float) -> PairedTensor:
    def side(count: int) -> TensorInfo:
        return TensorInfo(name, dtype, (count,), "x", 0, count * WIDTHS[dtype])

    if not group:
        return PairedTensor(name, "finetuned", None, side(numel), dtype, (numel,), numel, 0, "", numel * WIDTHS[dtype])
    pair = side(common), side(numel)
    return PairedTensor(name, "prune", *pair, dtype, (numel,), numel, common, group, numel * WIDTHS[dtype], density)


@st.composite
def tensors(draw: st.DrawFn) -> list[PairedTensor]:
    sizes = st.sampled_from([0, 1, 5, 1000, SMALL - 1, SMALL, SMALL + 1, 3 * SMALL, 5_000_000])
    found = []
    for i in range(draw(st.integers(0, 12))):
        common = draw(sizes)
        numel = common + draw(st.sampled_from([0, 0, 0, 7]))
        group = draw(st.sampled_from(["", f"own {i}", "a", "b"]))
        dtype, density = draw(st.sampled_from(sorted(WIDTHS))), draw(st.sampled_from([0.1, 0.1, 0.5]))
        found.append(tensor(f"t{i:02d}", numel, dtype, common, group, density))
    return found


@given(tensors())
def test_slices_cover_every_tensor_once_and_in_order(found):
    cut = sections(found, ["a", "b"])
    assert [t for s in cut for t in s.tensors] == found
    for one in cut:
        position = {t.name: [0, 0] for t in one.tensors}  # elements of both sides, bytes that pass through
        order = []
        for piece in one.pieces:
            assert piece.nbytes == sum(part.nbytes for part in piece.slices) <= PIECE_BYTES
            assert sum(2 * len(part.tensors) for part in piece.slices) <= MOST_RANGES
            for part in piece.slices:
                assert one.tensors[part.at : part.at + len(part.tensors)] == part.tensors
                order.append(part.at)
                if len(part.tensors) > 1:
                    assert all(0 < t.common == t.numel <= SMALL for t in part.tensors)
                    assert len({(t.dtype, t.parameter) for t in part.tensors}) == 1
                    assert part.stop == sum(t.common for t in part.tensors)
                    for t in part.tensors:
                        position[t.name][0] = t.common
                    continue
                (t,) = part.tensors
                already = position[t.name]
                expected = already[1] + (t.common * WIDTHS[t.dtype] if t.group else 0) if part.raw else already[0]
                assert part.start == expected
                already[part.raw] += part.stop - part.start
        assert order == sorted(order)
        for t in one.tensors:
            whole = [t.common, (t.numel - t.common) * WIDTHS[t.dtype]] if t.group else [0, t.numel * WIDTHS[t.dtype]]
            assert position[t.name] == whole


@given(tensors())
def test_a_group_that_is_wanted_together_lies_in_one_section(found):
    for name in ("a", "b"):
        holding = [s for s in sections(found, ["a", "b"]) if any(t.group == name for t in s.tensors)]
        assert len(holding) <= 1


def test_neighbours_share_a_chunk_up_to_a_limit():
    many = [tensor(f"t{i:05d}", 64, "BF16", 64, f"g{i}", 0.1) for i in range(20_000)]
    (one,) = sections(many)
    parts = [part for piece in one.pieces for part in piece.slices]
    assert len(parts) <= 20_000 * 64 // section._TOGETHER + 2
    assert BUFFER_BYTES >= PIECE_BYTES


@pytest.mark.parametrize("order", ["by name", "shuffled", "unaligned"])
@pytest.mark.parametrize("resident", [True, False])
def test_what_is_read_is_what_was_stored_wherever_it_lies(tmp_path: Path, order: str, resident: bool) -> None:
    shapes = {f"t{i:03d}": (random.Random(i).choice([1, 7, 64, 3000]),) for i in range(200)} | {"z": (300_000,)}
    generator = torch.Generator().manual_seed(0)
    sides = [{name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()} for _ in "pf"]
    for role, side in zip(("base", "finetuned"), sides, strict=True):
        names = sorted(side)
        if order != "by name":
            random.Random(role).shuffle(names)
        entries = [(name, "BF16", list(side[name].shape), bytes_of(side[name])) for name in names]
        if order == "unaligned":
            entries.insert(50, ("odd", "U8", [3], b"abc"))
        raw_tensors(tmp_path / role / "model.safetensors", entries)
    plan = make_plan(Recipe.of(**{side: str(tmp_path / side) for side in ("base", "finetuned", "out")}))
    folders = [Folder(tmp_path / role) for role in ("base", "finetuned")]
    reader = SectionReader(folders, 1 << 28)
    for one in sections(plan.shards[0].tensors):
        pieces = Pieces(reader, one, reader.start(one) if resident else NOTHING)
        for loaded in pieces:
            for part, views in loaded.slices():
                if part.raw:
                    continue
                for side, view in zip(sides, views, strict=True):
                    stored = b"".join(bytes_of(side[t.name]) for t in part.tensors)
                    width = 2 if len(part.tensors) == 1 else 1
                    begin = part.start * width if len(part.tensors) == 1 else 0
                    assert view.tobytes() == stored[begin : begin + view.size]
                    assert view.dtype == np.uint8
    reader.close()
