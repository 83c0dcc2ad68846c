"""pytest tests/pipeline/scoring/test_engine.py: compiled loops and torch give the bits that numpy and a sort give."""

from __future__ import annotations

import itertools
import math

import chunks
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fapm.errors import UserError
from fapm.formats.dtypes import upcast
from fapm.scoring import device
from fapm.scoring.compiled import BLOCK, TILE, CpuEngine
from fapm.scoring.device import make_engine
from fapm.scoring.engine import Chunk
from fapm.scoring.methods import METHODS, stream_of
from fapm.scoring.threshold import (
    HIGHEST_KEY,
    KEEP_ALL,
    KEEP_NONE,
    LOWEST_KEY,
    MAX_KEY,
    ZERO_KEY,
    Bracket,
    Threshold,
    bins_of,
    float_thresholds,
    histograms,
    key_of,
)
from fapm.shard.section import CHUNK

SCORED = [name for name, method in METHODS.items() if method.has_budget]
KINDS = ["bfloat16", "float32", "float64"]
SIZES = [1, 7, TILE + 1, BLOCK + 13]
SEED, NAME = 3, "model.layers.0.weight"

EXTREMES = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-38, 1e38, -3e38, 3e38, 0.5, 2.0]


def values(kind: str, size: int, seed: int, special: bool = False) -> np.ndarray:
    """What a chunk carries: uint16 bits for bfloat16, else the floats."""
    random = np.random.default_rng(seed)
    x = random.choice(EXTREMES, size) if special else random.normal(size=size)
    if not special:
        x[random.random(size) < 0.2] = 0
    if kind == "bfloat16":
        return torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return x.astype(kind)


def pair(kind: str, size: int, special: bool = False) -> tuple[np.ndarray, np.ndarray]:
    p, f = values(kind, size, 1, special), values(kind, size, 2, special)
    same = np.random.default_rng(3).random(size) < 0.3
    return p, np.where(same, p, f)


def chunk_of(p: np.ndarray, f: np.ndarray, start: int = 0) -> Chunk:
    random = np.random.default_rng(5)
    pruned, kept = (random.integers(0, 2**16, p.size, np.uint16) for _ in range(2))
    return chunks.one_run(p.copy(), f.copy(), pruned, kept, start, stream_of(SEED, NAME))


def engines(method: str) -> list:
    return [CpuEngine(method), chunks.torch_engine(method)]


def expected_scores(method: str, p: np.ndarray, f: np.ndarray) -> np.ndarray:
    return oracle.scores(method, upcast(p), upcast(f), SEED, NAME) + np.float32(0)


def check_count(engine, method, p, f, bracket, max_bins) -> None:
    s = expected_scores(method, p, f)
    keys = key_of(s).astype(np.int64)
    layout = bins_of(bracket, max_bins)
    above, bins, _ = chunks.count(engine, chunk_of(p, f), oracle.mean_of(upcast(p)), bracket, max_bins)
    inside = keys[(keys >= bracket.lo) & (keys <= bracket.hi)]
    assert above == int((keys > bracket.hi).sum())
    places = [layout.place(key) for key in inside.tolist()]
    assert np.array_equal(bins, np.bincount(places, minlength=layout.size))


def check_apply(engine, method, p, f, k) -> None:
    s, chunk, m = expected_scores(method, p, f), chunk_of(p, f), oracle.mean_of(upcast(p))
    mask = oracle.kept_mask(s, k)
    if 0 < k < s.size:
        kth = np.sort(s)[::-1][k - 1]
        limit = Threshold(int(key_of(kth.reshape(1))[0]), k - int((s > kth).sum()))
    else:
        limit = KEEP_ALL if k else KEEP_NONE
    out = np.zeros_like(chunk.kept)
    applied = chunks.apply(engine, chunk, m, limit, limit.ties, out)
    assert np.array_equal(out, np.where(mask, chunk.kept, chunk.pruned))
    with np.errstate(all="ignore"):
        d = np.abs(upcast(f) - upcast(p))
        squares = d.astype(np.float64) ** 2
    assert applied.kept == k
    assert applied.changed == int((d != 0).sum())
    assert applied.kept_changed == int((mask & (d != 0)).sum())
    if 0 < k < s.size:
        assert applied.ties == limit.ties
    assert applied.squares.shape == applied.kept_squares.shape == (-(-p.size // BLOCK),)
    assert math.isclose(applied.squares.sum(), squares.sum(), rel_tol=1e-12)
    assert math.isclose(applied.kept_squares.sum(), squares[mask].sum(), rel_tol=1e-12)


@pytest.mark.parametrize("method", SCORED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("special", [False, True], ids=["gaussian", "extremes"])
def test_counts_are_those_of_numpy(method, kind, special):
    for size in SIZES:
        p, f = pair(kind, size, special)
        for engine in engines(method):
            check_count(engine, method, p, f, Bracket(), 1 << 16)
            check_count(engine, method, p, f, Bracket(ZERO_KEY - (1 << 28), ZERO_KEY + (1 << 28)), 1 << 10)
            check_count(engine, method, p, f, Bracket(0x7C000000, 0xFF80FFFF, (0x7FFF, 0x8000, 0xBD00)), 1 << 10)


# The key of −0 lies right below that of 0, and belongs to no score.
EDGES = [
    (0, ZERO_KEY - 2), (0, ZERO_KEY), (ZERO_KEY, MAX_KEY), (ZERO_KEY + 1, MAX_KEY), (ZERO_KEY, ZERO_KEY),
    (ZERO_KEY - 1, ZERO_KEY), (ZERO_KEY - 1, MAX_KEY), (0x007FFFFF, 0x007FFFFF), (0xFF800000, 0xFF800000),
    (0xFF800001, MAX_KEY), (0xFF800000, MAX_KEY), (0, 0x00800000),
]  # fmt: skip


@pytest.mark.parametrize("method", ["fapm", "relative", "magnitude"])
@pytest.mark.parametrize(("lo", "hi"), EDGES)
def test_counts_at_the_edges_of_zero_and_of_infinity(method, lo, hi):
    p, f = pair("float32", 5000, special=True)
    for engine in engines(method):
        check_count(engine, method, p, f, Bracket(lo, hi), 1 << 12)


@pytest.mark.parametrize("method", ["fapm", "relative", "magnitude"])
@pytest.mark.parametrize("lo", [0, ZERO_KEY - 1, ZERO_KEY - (1 << 12)])
def test_zeros_are_above_a_bracket_that_ends_right_below_zero(method, lo):
    p, f = pair("float32", 5000)
    for engine in engines(method):
        check_count(engine, method, p, f, Bracket(lo, ZERO_KEY - 1), 1 << 12)


@pytest.mark.parametrize("method", SCORED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("special", [False, True], ids=["gaussian", "extremes"])
def test_masks_are_those_of_a_stable_sort(method, kind, special):
    for size in SIZES:
        p, f = pair(kind, size, special)
        for k in {0, 1, size // 10, size - 1, size}:
            for engine in engines(method):
                check_apply(engine, method, p, f, k)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["fapm", "relative", "magnitude"]),
    st.lists(st.tuples(st.sampled_from(EXTREMES), st.sampled_from(EXTREMES)), min_size=1, max_size=40),
    st.data(),
)
def test_any_pair_of_extremes_in_any_bracket(method, elements, data):
    p, f = (np.array(side, np.float32) for side in zip(*elements, strict=True))
    edges = [LOWEST_KEY, ZERO_KEY - 2, ZERO_KEY - 1, ZERO_KEY, ZERO_KEY + 1, HIGHEST_KEY]
    edges += [int(k) for k in key_of(expected_scores(method, p, f))]
    lo, hi = sorted(data.draw(st.tuples(st.sampled_from(edges), st.sampled_from(edges))))
    k = data.draw(st.integers(0, p.size))
    for engine in engines(method):
        check_count(engine, method, p, f, Bracket(lo, hi), 1 << 12)
        check_apply(engine, method, p, f, k)


@pytest.mark.parametrize("kind", KINDS)
def test_where_every_base_weight_is_zero(kind):
    p, f = np.zeros_like(values(kind, 3000, 1)), values(kind, 3000, 2)
    for method in SCORED:
        for engine in engines(method):
            check_count(engine, method, p, f, Bracket(), 1 << 16)
            for k in (1, 700, 2999):
                check_apply(engine, method, p, f, k)


def many(kind: str, sizes: list[int], special: bool = False) -> tuple[Chunk, list[str], np.ndarray]:
    """A chunk of several small tensors, their names, and mean|p| of each."""
    starts = np.cumsum([0, *sizes])
    p, f = pair(kind, int(starts[-1]), special)
    names = [f"{NAME}.{i}" for i in range(len(sizes))]
    random = np.random.default_rng(5)
    pruned, kept = (random.integers(0, 2**16, p.size, np.uint16) for _ in range(2))
    chunk = chunks.several_runs(p.copy(), f.copy(), pruned, kept, starts, [stream_of(SEED, name) for name in names])
    means = [oracle.mean_of(upcast(p[a:b])) for a, b in itertools.pairwise(starts)]
    return chunk, names, np.array(means, np.float32)


def scores_of_runs(method: str, chunk: Chunk, names: list[str]) -> list[np.ndarray]:
    p, f = (np.split(upcast(side), chunk.starts[1:-1]) for side in (chunk.p, chunk.f))
    return [oracle.scores(method, *sides, SEED, name) + np.float32(0) for *sides, name in zip(p, f, names, strict=True)]


MANY = [1, 31, 1, TILE, TILE + 1, 3, BLOCK, 100]


@pytest.mark.parametrize("method", SCORED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("special", [False, True], ids=["gaussian", "extremes"])
def test_small_tensors_side_by_side_are_each_what_it_is_alone(method, kind, special):
    chunk, names, means = many(kind, MANY, special)
    scores = scores_of_runs(method, chunk, names)
    runs = np.arange(len(MANY), dtype=np.int64)
    k = np.array([max(1, size // 3) for size in MANY])
    k[5] = 0  # not asked for
    for engine in engines(method):
        keys, ties = chunks.select(engine, chunk, means, k)
        for s, rank, key, tied in zip(scores, k, keys, ties, strict=True):
            if rank:
                kth = np.sort(s)[::-1][rank - 1]
                assert (key, tied) == (int(key_of(kth.reshape(1))[0]), rank - int((s > kth).sum()))
        left, out = ties.copy(), np.zeros_like(chunk.kept)
        keys[5] = MAX_KEY
        done = chunks.apply_runs(engine, chunk, means, float_thresholds(keys), runs, left, out)
        masks = [oracle.kept_mask(s, rank) for s, rank in zip(scores, k, strict=True)]
        assert np.array_equal(out, np.where(np.concatenate(masks), chunk.kept, chunk.pruned))
        assert done.kept.tolist() == k.tolist()
        assert not left.any()
        sums, squares = chunks.sums(engine, chunk)
        alone = np.split(np.abs(upcast(chunk.p).astype(np.float64)), chunk.starts[1:-1])
        assert np.allclose(sums, [x.sum() for x in alone], rtol=1e-12)
        assert np.allclose(squares, [(x**2).sum() for x in alone], rtol=1e-12)
        assert done.squares.size == len(MANY)


@pytest.mark.parametrize("method", ["fapm", "random"])
def test_runs_are_counted_for_their_groups(method):
    chunk, names, means = many("float32", MANY)
    scores = scores_of_runs(method, chunk, names)
    groups = np.array([1, 0, -1, 1, 1, 0, 1, -1])
    for engine in engines(method):
        counted = histograms([Bracket(), Bracket(ZERO_KEY, ZERO_KEY + (1 << 30))], [1 << 12, 1 << 10])
        assert chunks.count_runs(engine, chunk, means, groups, counted)
        for i, layout in enumerate(counted.layouts):
            bracket = layout.bracket
            keys = np.concatenate([key_of(s) for s, g in zip(scores, groups, strict=True) if g == i]).astype(np.int64)
            inside = keys[(keys >= bracket.lo) & (keys <= bracket.hi)]
            wanted = np.bincount((inside - bracket.lo) >> layout.shift, minlength=layout.size)
            assert np.array_equal(counted.of(i), wanted)
            assert counted.above[i] == (keys > bracket.hi).sum()


@pytest.mark.parametrize("method", ["fapm", "magnitude"])
def test_ties_of_one_group_are_used_up_over_several_runs(method):
    size = 50
    p, f = np.ones(3 * size, np.float32), np.full(3 * size, 3, np.float32)
    pruned, kept = np.zeros(3 * size, np.uint16), np.ones(3 * size, np.uint16)
    chunk = chunks.several_runs(p, f, pruned, kept, [0, size, 2 * size, 3 * size], [0, 0, 0])
    score = np.float32(2 - 2 if method == "fapm" else 2)
    for engine in engines(method):
        left, out = np.array([70]), np.zeros_like(kept)
        thresholds, groups = np.full(3, score), np.zeros(3, np.int64)
        done = chunks.apply_runs(engine, chunk, np.ones(3, np.float32), thresholds, groups, left, out)
        assert done.kept.tolist() == [50, 20, 0]
        assert out.tolist() == [1] * 70 + [0] * 80
        assert left[0] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_blocks(kind):
    for size in SIZES:
        p, f = pair(kind, size)
        x = np.abs(upcast(p).astype(np.float64))
        for engine in engines("fapm"):
            sums, squares = chunks.sums(engine, chunk_of(p, f))
            for i in range(-(-size // BLOCK)):
                block = x[i * BLOCK : (i + 1) * BLOCK]
                assert math.isclose(sums[i], math.fsum(block), rel_tol=1e-13)
                assert math.isclose(squares[i], math.fsum(block**2), rel_tol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_adds_up_in_the_order_of_the_compiled_loops(kind):
    for size in (1, TILE - 1, TILE, 3 * TILE + 5, BLOCK, 3 * BLOCK + 100):
        p = values(kind, size, size)
        compiled, torch_ = (chunks.sums(engine, chunk_of(p, p)) for engine in engines("fapm"))
        assert np.array_equal(compiled, torch_), size


@pytest.mark.parametrize("method", SCORED)
def test_a_pass_waits_once_for_all_its_chunks(method):
    counted_device = chunks.Device()
    engine, size = chunks.OneRunOnDevice(method, counted_device), 4 * BLOCK
    p, f = pair("bfloat16", size)
    parts = [slice(begin, begin + BLOCK) for begin in range(0, size, BLOCK)]
    several = [chunks.one_run(p[s], f[s], p[s], f[s], s.start) for s in parts]
    m, zero, out = np.array([0.7], np.float32), np.zeros(1, np.int64), np.empty_like(p)
    counted, left = histograms([Bracket()]), np.array([5])
    limit = np.array([0.1], np.float32)
    passes = [
        (engine.sums(), [(chunk,) for chunk in several]),
        (engine.counting(counted), [(chunk, m, zero) for chunk in several]),
        (engine.application(left), [(c, m, limit, zero, out[s]) for c, s in zip(several, parts, strict=True)]),
    ]
    for i, (passed, added) in enumerate(passes):
        for operands in added:
            passed.add(*operands)
        assert counted_device.waits == i
        assert len(passed.result()) == len(several)
        assert counted_device.waits == i + 1
    assert counted.bins.sum() + counted.above[0] == size


def test_a_device_says_when_a_bracket_holds_more_than_it_has_picked_out():
    p, f = pair("float32", 3 * BLOCK)
    keys = np.sort(key_of(expected_scores("fapm", p, f)).astype(np.int64))
    engine, m = chunks.torch_engine("fapm"), np.array([oracle.mean_of(p)], np.float32)
    for share, complete in ((50, True), (5, False)):
        bracket = Bracket(int(keys[-100 - keys.size // share]), int(keys[-100]))
        counted = histograms([bracket])
        found = chunks.only(engine.counting(counted), chunk_of(p, f), m, chunks.GROUP)
        assert found == (True, complete)
        inside = np.count_nonzero((keys >= bracket.lo) & (keys <= bracket.hi)) if complete else 0
        assert (counted.bins.sum(), bool(counted.above[0])) == (inside, complete)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_is_right_to_the_bit(kind):
    for seed in range(20):
        p = values(kind, 3 * BLOCK + 5, seed)
        sums, _ = chunks.sums(CpuEngine("fapm"), chunk_of(p, p))
        assert np.float32(math.fsum(sums) / p.size) == oracle.mean_of(upcast(p))


@pytest.mark.parametrize("method", SCORED)
@pytest.mark.parametrize("make", [CpuEngine, chunks.torch_engine], ids=["compiled", "torch"])
def test_nothing_depends_on_where_a_tensor_is_cut(method, make):
    assert CHUNK % BLOCK == 0
    engine, size = make(method), 3 * BLOCK + 100
    p, f = pair("bfloat16", size)
    m = oracle.mean_of(upcast(p))
    limit = Threshold(ZERO_KEY, size // 7)

    def in_steps(step: int) -> tuple:
        whole = chunk_of(p, f)
        bins, out, left = 0, np.empty_like(whole.kept), limit.ties
        above, lists, counts = 0, ([], [], [], []), np.zeros(3, int)
        for start in range(0, size, step):
            part = slice(start, start + step)
            mine = (side[part].copy() for side in (p, f))
            chunk = chunks.one_run(*mine, whole.pruned[part], whole.kept[part], start, whole.streams[0])
            higher, here, _ = chunks.count(engine, chunk, m, Bracket())
            above, bins = above + higher, bins + here
            applied = chunks.apply(engine, chunk, m, limit, left, out[part])
            left -= applied.ties
            counts += (applied.kept, applied.changed, applied.kept_changed)
            parts = (*chunks.sums(engine, chunk), applied.squares, applied.kept_squares)
            for found, block in zip(lists, parts, strict=True):
                found += block.tolist()
        return (above, bins.tolist(), out.tolist(), left, counts.tolist()), np.array(lists)

    counts, sums = in_steps(size)
    for step in (BLOCK, 2 * BLOCK):
        other_counts, other_sums = in_steps(step)
        assert counts == other_counts
        assert np.array_equal(sums, other_sums)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", SCORED)
def test_the_inputs_are_left_as_they_are(method, kind):
    """A resident section is used for every pass: mean, counts and output see the same weights."""
    p, f = pair(kind, 3000)
    for engine in engines(method):
        chunk = chunk_of(p, f)
        before = [side.tobytes() for side in (chunk.p, chunk.f, chunk.pruned, chunk.kept)]
        chunks.sums(engine, chunk)
        chunks.count(engine, chunk, 1, Bracket())
        chunks.apply(engine, chunk, 1, Threshold(ZERO_KEY, 5), 5, np.empty_like(chunk.kept))
        assert [side.tobytes() for side in (chunk.p, chunk.f, chunk.pruned, chunk.kept)] == before


@pytest.mark.parametrize("method", SCORED)
def test_what_is_not_finite_is_noticed(method):
    for bad in (np.nan, np.inf, -np.inf):
        for side in (0, 1):
            for kind in ("float32", "float64"):
                p, f = pair(kind, TILE + 5)
                (p, f)[side][TILE + 1] = bad
                for engine in engines(method):
                    *_, finite = chunks.count(engine, chunk_of(p, f), 1, Bracket())
                    assert not finite
                    clean = pair(kind, TILE + 5)
                    *_, finite = chunks.count(engine, chunk_of(*clean), 1, Bracket())
                    assert finite


def test_output_bits_of_every_width():
    p, f = pair("float32", 3000)
    s, m = expected_scores("fapm", p, f), oracle.mean_of(p)
    kth = np.sort(s)[::-1][299]
    limit = Threshold(int(key_of(kth.reshape(1))[0]), 300 - int((s > kth).sum()))
    for width in (1, 2, 4, 8):
        random = np.random.default_rng(width)
        pruned, kept = (random.integers(0, 256, 3000 * width, np.uint8).view(f"u{width}") for _ in range(2))
        for engine in engines("fapm"):
            out = np.zeros_like(kept)
            chunks.apply(engine, chunks.one_run(p.copy(), f.copy(), pruned, kept), m, limit, limit.ties, out)
            assert np.array_equal(out, np.where(oracle.kept_mask(s, 300), kept, pruned))


@pytest.fixture
def driver(monkeypatch):
    """A machine with the nodes of a driver, and what torch says of it."""
    monkeypatch.setattr(device.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    return monkeypatch


def test_gpus_are_those_that_torch_may_use(driver):
    assert device.gpus() == 2 and device.uses_gpu("auto") and device.uses_gpu("cuda")
    assert not device.uses_gpu("cpu")
    with pytest.raises(UserError, match="--device cuda:2: the last GPU here is cuda:1"):
        make_engine("fapm", "cuda:2")
    driver.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))  # no float64
    assert device.gpus() == 0
    driver.setattr(torch.accelerator, "is_available", lambda: False)  # CUDA_VISIBLE_DEVICES says so
    assert device.gpus() == 0
    driver.delattr(torch.accelerator, "get_memory_info")
    driver.setattr(torch.accelerator, "is_available", lambda: True)
    assert device.gpus() == 0


def test_a_device_that_is_not_there_is_refused(driver):
    driver.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch finds no GPU here, or is too old"):
        make_engine("fapm", "cuda")
    assert isinstance(make_engine("fapm", "auto"), CpuEngine)
    driver.undo()
    driver.setattr(device.glob, "glob", lambda pattern: [])
    assert device.gpus() == 0


@pytest.mark.skipif(not device.gpus(), reason="torch finds no GPU here")
@pytest.mark.parametrize("method", SCORED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_bits_of_the_cpu(method, kind):
    engine = chunks.torch_engine(method, "cuda")
    for special in (False, True):
        for size in SIZES:
            p, f = pair(kind, size, special)
            check_count(engine, method, p, f, Bracket(), 1 << 16)
            for k in {1, size // 10, size // 2, size}:
                check_apply(engine, method, p, f, k)
