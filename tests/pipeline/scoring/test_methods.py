"""pytest tests/pipeline/scoring/test_methods.py: every method against its formula, in numpy, in torch and compiled."""

from __future__ import annotations

import uuid

import chunks
import numpy as np
import oracle
import pytest
import torch
from checkpoints import gaussian, load
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fapm.run import prune
from fapm.scoring import methods as score
from fapm.scoring.compiled import CpuEngine
from fapm.scoring.methods import METHODS, Selection, evaluate, stream_of, uniform
from fapm.scoring.threshold import KEEP_ALL, MAX_KEY, Bracket

SCORED = [name for name, method in METHODS.items() if method.has_budget]
DEFINED_BY_DELTA = ["fapm", "magnitude", "relative"]


def numpy_scores(method: str, p: np.ndarray, f: np.ndarray) -> np.ndarray:
    return evaluate(METHODS[method], p, f, oracle.mean_of(p), stream_of(0, "w"), np.arange(p.size))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("method", SCORED)
def test_each_method_is_its_formula(method, kind):
    random = np.random.default_rng(0)
    p = random.normal(size=2000).astype(kind)
    f = (p + random.normal(0, 0.05, 2000)).astype(kind)
    f[::3] = p[::3]
    found = numpy_scores(method, p, f)
    assert found.dtype == np.float32
    assert np.array_equal(found, oracle.scores(method, p, f, 0, "w"))
    d, a = np.abs(f.astype(np.float64) - p), np.abs(p.astype(np.float64))
    in_reals = {"fapm": d - a.mean() * d / a, "magnitude": d, "relative": -d / a}
    if method in in_reals:
        assert np.allclose(found, in_reals[method], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", DEFINED_BY_DELTA)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_where_the_score_is_not_defined(method, kind):
    p = np.array([0, 0, 0, -0.0, 2, 2], kind)
    f = np.array([0, 1, -1, 0.0, 2, 3], kind)
    s = numpy_scores(method, p, f)
    assert s[[0, 3, 4]].tolist() == [0, 0, 0]
    if method == "magnitude":
        assert s.tolist() == [0, 1, 1, 0, 0, 1]
    else:
        assert s[[1, 2]].tolist() == [-np.inf, -np.inf]
        assert np.isfinite(s[5])


@pytest.mark.parametrize("method", DEFINED_BY_DELTA)
def test_a_base_of_zeros(method):
    p, f = np.zeros(4, np.float32), np.array([0, 1, -1, 0], np.float32)
    expected = [0, 1, 1, 0] if method == "magnitude" else [0, -np.inf, -np.inf, 0]
    assert numpy_scores(method, p, f).tolist() == expected


weights = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(arrays(np.float32, 12, elements=weights), arrays(np.float32, 12, elements=weights))
def test_a_score_is_never_nan_nor_minus_zero(p, f):
    for method in DEFINED_BY_DELTA:
        s = numpy_scores(method, p, f)
        assert not np.isnan(s).any()
        assert not (np.signbit(s) & (s == 0)).any()


@settings(deadline=None)
@given(arrays(np.float32, 64, elements=weights), arrays(np.float32, 64, elements=weights))
def test_numpy_torch_and_compiled_agree_bit_for_bit(p, f):
    """Each score is found from outside: the bin, one key wide, that the element alone is counted in."""
    for method in DEFINED_BY_DELTA:
        s, m = numpy_scores(method, p, f), oracle.mean_of(p)
        assert np.array_equal(s, oracle.scores(method, p, f))
        torch_engine = chunks.torch_engine(method)
        chunk = chunks.one_run(p.copy(), f.copy(), p.view(np.uint32), f.view(np.uint32))
        assert np.array_equal(torch_engine.scores(torch_engine.load(chunk), float(m))[1].numpy(), s)
        for i in range(0, 64, 9):
            key = int(score_key(s[i]))
            one = chunks.one_run(p[i : i + 1], f[i : i + 1], *[np.zeros(1, np.uint32)] * 2)
            assert chunks.count(CpuEngine(method), one, m, Bracket(key, key))[1].tolist() == [1]


def score_key(s: np.float32) -> int:
    from fapm.scoring.threshold import key_of

    return int(key_of(np.array([s]))[0])


def test_a_tiny_double_score_counts_as_zero():
    """A float64 score below the smallest float32 rounds to −0 or to 0: one value, whose ties go by position."""
    p, f = np.array([1.0, 1e-60, 1.0]), np.array([1.0, 1.5e-60, 1.0 + 1e-15])
    for engine in (CpuEngine("magnitude"), chunks.torch_engine("magnitude")):
        chunk = chunks.one_run(p.copy(), f.copy(), *[np.zeros(3, np.uint64)] * 2)
        _, bins, _ = chunks.count(engine, chunk, 0.5, Bracket(0, MAX_KEY))
        assert bins[1 << 15] == 3 - int(np.float32(1e-15) > 0)
    for engine in (CpuEngine("relative"), chunks.torch_engine("relative")):
        q, g = np.array([1e50, 1.0, 1e50]), np.array([np.nextafter(1e50, 2e50), 1.0, 1e50])
        assert np.float32(-(g[0] - q[0]) / q[0]) != 0  # an honest check that this one does not vanish
        chunk = chunks.one_run(q.copy(), g.copy(), *[np.zeros(3, np.uint64)] * 2)
        _, bins, _ = chunks.count(engine, chunk, 0.5, Bracket(0, MAX_KEY))
        assert bins[1 << 15] == 2


def test_relative_does_not_depend_on_the_mean():
    """S = −|Δ|/|p| has no m in it, so it is the same where m is beyond float32."""
    p, f = np.array([1e39, 2e39, 4e39]), np.array([1.1e39, 2.1e39, 4.1e39])
    with np.errstate(over="ignore"):
        s = evaluate(METHODS["relative"], p, f, oracle.mean_of(p), 0, np.arange(3))
    assert np.allclose(s, [-0.1, -0.05, -0.025])


# Random numbers.


def test_uniform_is_splitmix64_of_seed_name_and_index():
    for seed, name in ((0, "a"), (1, "a"), (2**62, "model.layers.3.weight"), (0, "ü.重み")):
        found = uniform(stream_of(seed, name), np.arange(1000))
        assert found.dtype == np.float32
        assert np.array_equal(found, oracle.uniform(seed, name, 1000))


def test_uniform_looks_uniform():
    u = uniform(stream_of(0, "w"), np.arange(1_000_000)).astype(np.float64)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * np.sqrt(1 / 12 / u.size)
    counts = np.histogram(u, 256, (0, 1))[0]
    chi2 = ((counts - u.size / 256) ** 2).sum() / (u.size / 256)
    assert 255 - 5 * np.sqrt(2 * 255) < chi2 < 255 + 5 * np.sqrt(2 * 255)
    for lag in (1, 2, 64, 1024):
        assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 5 / np.sqrt(u.size)
    low_bits = (u * 2**24).astype(np.int64) & 1
    assert abs(low_bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(u.size)


def test_uniform_depends_on_seed_name_and_index_only():
    first = uniform(stream_of(0, "a"), np.arange(5000))
    assert np.array_equal(first[1234:2000], uniform(stream_of(0, "a"), np.arange(1234, 2000)))
    for seed, name in ((1, "a"), (0, "b")):
        other = uniform(stream_of(seed, name), np.arange(5000))
        assert abs(np.corrcoef(first, other)[0, 1]) < 5 / np.sqrt(5000)


def test_uniform_is_the_same_in_both_engines():
    n, start = 5000, 1 << 33  # past 32 bits
    zeros = np.zeros(n, np.float32)
    for seed in range(3):
        u = uniform(stream_of(seed, "w"), np.arange(start, start + n))
        limit = np.float32(np.sort(u)[::-1][n // 3])
        for engine in (CpuEngine("random"), chunks.torch_engine("random")):
            chunk = chunks.one_run(zeros, zeros, *[np.zeros(n, np.uint32)] * 2, start, stream_of(seed, "w"))
            assert chunks.count(engine, chunk, 0, Bracket(0, score_key(limit)))[0] == int((u > limit).sum())


# A new method is one function.


def cubic(d, p, m, u):
    return d * d * d - m * p


@pytest.fixture
def new_method(monkeypatch):
    name = f"cubic-{uuid.uuid4().hex}"
    monkeypatch.setitem(METHODS, name, Selection(cubic))
    return name


def cubic_oracle(p: torch.Tensor, f: torch.Tensor, density: float) -> torch.Tensor:
    x, y = oracle.real(p), oracle.real(f)
    d, m = np.abs(y - x), oracle.mean_of(x)
    mask = oracle.kept_mask(d * d * d - m * np.abs(x), int(x.size * density))
    return torch.where(torch.from_numpy(mask).reshape(p.shape), f, p)


@pytest.mark.parametrize("engine", ["compiled", "torch"])
def test_a_new_method_is_one_function(runner, new_method, engine):
    base, finetuned = gaussian({"a": (400, 300), "b": (700,)})
    runner.write(base, finetuned)
    recipe = runner.recipe("out").model_copy(update={"method": new_method})
    prune(recipe, pool=chunks.on_torch(chunks.Device()) if engine == "torch" else None)
    out = load(runner.folder / "out")
    for name in base:
        assert torch.equal(out[name], cubic_oracle(base[name], finetuned[name], 0.1))


def test_a_new_method_is_a_choice_of_the_recipe(runner, new_method):
    assert runner.recipe(method=new_method).method == new_method


def test_keep_all_is_every_element():
    p = np.array([0, 1, -1, 0], np.float32)
    f = np.array([1, 1, -2, 0], np.float32)
    for engine in (CpuEngine("fapm"), chunks.torch_engine("fapm")):
        out = np.zeros(4, np.uint32)
        chunk = chunks.one_run(p.copy(), f.copy(), p.view(np.uint32), f.view(np.uint32))
        chunks.apply(engine, chunk, 0.5, KEEP_ALL, 0, out)
        assert np.array_equal(out, f.view(np.uint32))


def test_the_formulas_are_plain_operators():
    """They take floats too, so that anyone can check one by hand."""
    assert score.fapm(0.5, 2.0, 1.0, None) == 0.25
    assert score.relative(0.5, 2.0, 1.0, None) == -0.25
    assert score.rescaled(1.0, 1.5, 0.5) == 2.0
    assert score.interpolated(1.0, 3.0, 0.25) == 1.5
