"""pytest tests/pipeline/shard/test_passes.py: each pass over a section by itself, in memory and streamed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from checkpoints import Tensors, gaussian, save

from fapm import Recipe, UserError
from fapm.planning.make import make_plan
from fapm.planning.plan import Plan
from fapm.scoring.device import make_engine
from fapm.scoring.threshold import Bracket, Threshold, histograms, key_of
from fapm.shard import passes
from fapm.shard.passes import BlockSums, HistogramMemory, SectionState, Tally
from fapm.shard.reading import NOTHING, Pieces, SectionReader
from fapm.shard.section import sections
from fapm.storage.local import Folder

SHAPES = {
    "layers.0.large": (300, 700), "layers.0.small": (40,), "layers.0.tiny": (3,), "layers.1.large": (70_001,),
    "layers.1.small": (64, 64), "layers.1.z": (5, 5),
}  # fmt: skip


class Written:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []

    def reserve(self, nbytes: int, align: int = 1) -> np.ndarray:
        self.parts.append(np.zeros(nbytes, np.uint8))
        return self.parts[-1]

    def filled_from(self, name: str, start: int, base: np.ndarray) -> None: ...

    def append(self, data: np.ndarray) -> None:
        self.parts.append(data.copy())

    def bytes(self) -> bytes:
        return b"".join(part.tobytes() for part in self.parts)


class Setting:
    """A pair on disk, and a state for the one section of its one shard."""

    def __init__(self, folder: Path, resident: bool):
        self.folder, self.resident = folder, resident
        self.base, self.finetuned = gaussian(SHAPES, torch.bfloat16)
        self.write(self.base, self.finetuned)

    def write(self, base: Tensors, finetuned: Tensors) -> None:
        save(self.folder / "base", base)
        save(self.folder / "finetuned", finetuned)

    def state(self, **choices: object) -> SectionState:
        sides = {side: str(self.folder / side) for side in ("base", "finetuned", "out")}
        self.recipe = Recipe.of(**sides, **choices)
        self.plan: Plan = make_plan(self.recipe)
        (self.section,) = sections(self.plan.shards[0].tensors, list(self.plan.groups))
        reader = SectionReader([Folder(sides["base"]), Folder(sides["finetuned"])], 1 << 28)
        loads = reader.start(self.section) if self.resident else NOTHING
        pieces = Pieces(reader, self.section, loads)
        return SectionState(self.recipe, make_engine(self.recipe.method, "cpu"), pieces, self.plan.groups)

    def sides(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return oracle.real(self.base[name]), oracle.real(self.finetuned[name])

    def scores(self, group: str, scope: str, method: str = "fapm") -> np.ndarray:
        names = [name for name in sorted(SHAPES) if group in (name, oracle.group_of(name, scope))]
        return np.concatenate([oracle.scores(method, *self.sides(name), name=name) for name in names]) + np.float32(0)


@pytest.fixture(params=[True, False], ids=["resident", "streamed"])
def setting(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Setting]:
    return Setting(tmp_path, request.param)


def test_means(setting):
    state = setting.state()
    passes.find_means(state)
    for i, tensor in enumerate(state.tensors):
        p, _ = setting.sides(tensor.name)
        assert np.float32(state.mean[i]) == oracle.mean_of(p)
        assert math.isclose(state.base_squares[i], math.fsum(p.astype(float) ** 2), rel_tol=1e-12)


def test_known_means_are_not_looked_for(setting):
    state = setting.state()
    known = np.full((len(state.tensors), 2), 7.0)
    known[0] = np.nan
    passes.find_means(state, known)
    assert (state.mean[1:] == 7).all()
    assert state.mean[0] == pytest.approx(np.abs(setting.sides(state.tensors[0].name)[0]).mean(), rel=1e-6)


def test_counts(setting):
    state = setting.state(scope="layer")
    passes.find_means(state)
    counted = histograms([Bracket(1 << 31, (1 << 31) + (1 << 30)), Bracket()], [1 << 12, 1 << 12])
    passes.count([Tally(state, ["layers.1", "layers.0"], counted, 0)])
    for i, group in enumerate(("layers.1", "layers.0")):
        keys = key_of(setting.scores(group, "layer")).astype(np.int64)
        bracket, shift = counted.layouts[i].bracket, counted.layouts[i].shift
        inside = keys[(keys >= bracket.lo) & (keys <= bracket.hi)]
        assert counted.above[i] == (keys > bracket.hi).sum()
        assert np.array_equal(counted.of(i), np.bincount((inside - bracket.lo) >> shift, minlength=counted.of(i).size))


@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
@pytest.mark.parametrize("density", [0, 0.1, 0.5, 1])
def test_search(setting, scope, density):
    state = setting.state(scope=scope, density=density)
    passes.find_means(state)
    passes.search([state], [{}], [{}])
    for g, name in enumerate(state.names):
        scores, k = setting.scores("everything" if scope == "global" else name, scope), state.groups[name].k
        if not 0 < k < scores.size:
            continue
        kth = np.sort(scores)[::-1][k - 1]
        assert state.keys[g] == key_of(kth.reshape(1))[0]
        assert state.ties[g] == state.quotas[g] == k - (scores > kth).sum()


def test_search_takes_what_was_found_before_and_what_is_left_of_its_ties(setting):
    state = setting.state(scope="global")
    state.groups = {name: type(g)(g.name, g.numel, g.k, g.tensors, True) for name, g in state.groups.items()}
    passes.search([state], [{"all": Threshold(123, 45)}], [{"all": 6}])
    assert (state.keys[0], state.quotas[0], state.ties[0]) == (123, 45, 6)


@pytest.mark.parametrize("scope", ["tensor", "layer"])
def test_apply(setting, scope):
    state, sink = setting.state(scope=scope), Written()
    passes.find_means(state)
    passes.search([state], [{}], [{}])
    (rows,) = passes.apply([state], [sink])
    expected = oracle.prune(setting.base, setting.finetuned, scope=scope)
    data = b"".join(expected[t.name].view(torch.int16).numpy().tobytes() for t in state.tensors)
    assert sink.bytes() == data
    assert not state.ties.any()
    for row, tensor in zip(rows, state.tensors, strict=True):
        p, f = setting.sides(tensor.name)
        d = np.abs(f - p).astype(float)
        kept = oracle.real(expected[tensor.name]) == f
        assert row["changed"] == (d != 0).sum()
        assert row["kept_changed"] == (kept & (d != 0)).sum()
        assert row["norm_delta"] == pytest.approx(np.sqrt((d**2).sum()), rel=1e-9)
        assert row["kept_share"] == pytest.approx((d[kept] ** 2).sum() / (d**2).sum(), rel=1e-9)


def test_weights_that_are_not_finite_are_named(setting):
    broken = {name: t.clone() for name, t in setting.finetuned.items()}
    broken["layers.1.z"].view(-1)[3] = math.nan
    setting.write(setting.base, broken)
    state = setting.state()
    passes.find_means(state)
    passes.search([state], [{}], [{}])
    with pytest.raises(UserError, match=r"finetuned 'layers\.1\.z' has 1 NaN and 0 Inf"):
        passes.apply([state], [Written()])


def test_sums_of_blocks_are_exact_in_whatever_chunks_they_come():
    numbers = np.random.default_rng(0).normal(0, 1e10, 1000)
    sums = BlockSums(5)
    sums.add(1, 3, np.array([1.0, 2.0, 3.0]))
    for part in np.split(numbers, [1, 17, 500]):
        sums.add(4, 1, part)
    assert sums.sums().tolist() == [0, 1, 2, 3, math.fsum(numbers)]
    sums.add(0, 1, np.array([1e308, 1e308]))
    assert sums.sums()[0] == math.inf


def test_scratch_is_zero_each_time_and_grows():
    scratch = HistogramMemory()
    for size in (5, 3, 900):
        zeros = scratch.zeros(size)
        assert zeros.size == size
        assert not zeros.any()
        zeros += 1
