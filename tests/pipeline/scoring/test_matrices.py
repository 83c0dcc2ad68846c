"""Singular values and projections, block by block, against numpy's SVD in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fapm.scoring import matrices
from fapm.scoring.matrices import (
    Delta,
    bytes_of,
    decompose,
    flops_of,
    flops_per_second,
    kept,
    library,
    one_thread,
    projector,
    rows_of,
)
from fapm.scoring.spectrum import above_noise, effective_rank, median_of_noise

SHAPES = [(64, 32), (32, 64), (700, 300), (300, 700), (256, 256), (9000, 30), (30, 9000), (2, 600), (600, 2)]
SPECTRA = ["noise", "signal", "low rank", "ties", "ill", "zero"]


def pair(shape: tuple[int, int], spectrum: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """p and f, float32, of a Δ with these singular values."""
    rng, k = np.random.default_rng(seed), min(shape)
    u, v = (np.linalg.qr(rng.standard_normal((side, k)))[0] for side in shape)
    sigma = {
        "noise": np.zeros(k),
        "signal": np.where(np.arange(k) < 1 + k // 10, 40.0, 0),
        "low rank": np.where(np.arange(k) < 1 + k // 8, np.linspace(2, 1, k), 0),
        "ties": np.where(np.arange(k) < 1 + k // 4, 3.0, 1.0),
        "ill": np.logspace(0, -9, k),
        "zero": np.zeros(k),
    }[spectrum]
    delta = (u * sigma) @ v.T
    if spectrum in ("noise", "signal"):
        delta += rng.standard_normal(shape) / math.sqrt(max(shape))
    p = rng.standard_normal(shape) if spectrum in ("noise", "signal", "zero") else np.zeros(shape)
    p = p.astype(np.float32)
    return p, (p + delta).astype(np.float32)


def delta_of(p: np.ndarray, f: np.ndarray) -> Delta:
    rows = rows_of(p.shape)
    return Delta(p.shape, lambda first: ((i, p[i : i + rows], f[i : i + rows]) for i in range(first, len(p), rows)))


@pytest.fixture(autouse=True, params=[1 << 19, 1 << 12], ids=["one block", "many blocks"])
def block(request, monkeypatch):
    monkeypatch.setattr(matrices, "BLOCK", request.param)
    monkeypatch.setattr(matrices, "FEWEST_ROWS", 4 if request.param < 1 << 19 else 128)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_singular_values_are_those_of_a_float64_svd(shape, spectrum):
    p, f = pair(shape, spectrum)
    exact = np.linalg.svd((f - p).astype(np.float64), compute_uv=False)
    found = decompose(delta_of(p, f))
    assert np.all(np.diff(found.sigma) <= 0)
    assert np.abs(found.sigma - exact).max() <= 1e-6 * exact[0]
    large = exact > 1e-10 * exact[0]
    assert np.allclose(found.sigma[large], exact[large], rtol=1e-4)
    assert np.allclose(found.vectors.T @ found.vectors, np.eye(min(shape)), atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("rule", "parameter"), [(above_noise, 1.0), (above_noise, 0.3), (effective_rank, 0.25)])
def test_what_is_kept_is_what_a_float64_svd_says(shape, spectrum, rule, parameter):
    p, f = pair(shape, spectrum)
    u, sigma, v = np.linalg.svd((f - p).astype(np.float64), full_matrices=False)
    sigma = np.where(sigma > max(shape) * 2.0**-52 * sigma[0], sigma, 0)
    delta = delta_of(p, f)
    found = decompose(delta)
    gains = rule(found.sigma, shape, parameter)
    if spectrum != "ties":  # among equal σ the last bit of each decides where the rank ends
        assert np.array_equal(gains, rule(sigma, shape, parameter))
    blocks = list(kept(delta, projector(found, gains)))
    assert np.array_equal(np.concatenate([one for one, _, _ in blocks]), p)
    assert np.array_equal(np.concatenate([one for _, one, _ in blocks]), f)
    exact = (u * (sigma * gains)) @ v
    if spectrum == "ties" and 0 < np.count_nonzero(gains == 1) < min(shape):
        return  # which of the vectors of equal σ are the first is nobody's choice
    assert np.abs(np.concatenate([part for _, _, part in blocks]) - exact).max() <= 1e-6 * np.abs(f - p).max()


@pytest.mark.parametrize("shape", [(64, 900), (300, 700)])
def test_no_bit_depends_on_how_many_blocks_fit_in_memory(shape):
    p, f = pair(shape, "ill")
    delta = delta_of(p, f)
    found = [decompose(delta, held) for held in (1, 2, 1000)]
    by = projector(found[0], np.linspace(1, 0, min(shape)))
    parts = [np.concatenate([part for _, _, part in kept(delta, by, held)]) for held in (1, 3, 1000)]
    for other in found[1:]:
        assert other.sigma.tobytes() == found[0].sigma.tobytes()
        assert other.vectors.tobytes() == found[0].vectors.tobytes()
    assert parts[0].tobytes() == parts[1].tobytes() == parts[2].tobytes()


def test_the_threshold_is_that_of_gavish_and_donoho():
    """Their approximation for noise of unknown level, a cubic that is off by 0.02 at most, and 2.858 for a square."""
    for beta in (0.05, 0.2, 0.5, 0.8, 1.0):
        omega, shape = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43, (round(beta * 100_000), 100_000)
        off = 0.0005 if beta == 1 else 0.02
        omega = 2.858 if beta == 1 else omega
        assert not above_noise(np.ones(3), shape, 1 / (omega - off)).any()
        assert above_noise(np.ones(3), shape, 1 / (omega + off)).all()


def test_half_of_the_noise_is_below_the_median_of_its_law():
    rng = np.random.default_rng(0)
    for shape in ((400, 400), (300, 1000), (50, 4000)):
        sigma = np.linalg.svd(rng.standard_normal(shape) / math.sqrt(max(shape)), compute_uv=False)
        assert np.median(sigma) == pytest.approx(math.sqrt(median_of_noise(min(shape) / max(shape))), rel=0.02)


def test_the_effective_rank_of_equal_values_is_their_number():
    sigma = np.array([2.0] * 5 + [0.0] * 3)
    assert math.exp(math.log(5)) == pytest.approx(5)
    assert 5 <= effective_rank(sigma, (8, 8), 0.0).sum() <= 6  # exp(ln 5) may round up
    assert effective_rank(np.array([8.0, 0, 0]), (3, 3), 0.5).tolist() == [1, 0.5, 0.5]
    assert not effective_rank(np.zeros(4), (4, 4), 0.0).any()


def test_memory_is_that_of_the_smaller_side():
    assert bytes_of((128256, 4096)) < 5 * 8 * 4096**2 + (128 << 20)
    assert bytes_of((4096, 14336)) < 1 << 30
    assert bytes_of((100, 1 << 20)) < 100 * (1 << 20) * 64


def test_one_thread_is_for_as_long_as_anybody_computes():
    from threadpoolctl import threadpool_info

    def threads() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    before = threads()
    with one_thread:
        with one_thread:
            assert threads() == {1}
        assert threads() == {1}
    assert threads() == before


def test_the_library_names_itself_and_its_processor():
    assert library().startswith(f"numpy {np.__version__}")


def test_what_it_costs_is_told_in_products():
    """Against the flops of the products themselves; of the eigenvectors only that they take most of a square one."""
    assert flops_of((100_000, 10)) == pytest.approx(3 * 100_000 * 10 * 10, rel=0.01)
    assert flops_of((3000, 3000)) == 13 * 3000**3
    assert flops_of((400, 900)) == flops_of((900, 400))
    assert 1e8 < flops_per_second(64) < 1e13
