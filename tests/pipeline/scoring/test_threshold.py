"""pytest tests/pipeline/scoring/test_threshold.py

Counting finds what a sort finds, from any bracket, with any bins.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fapm.scoring import threshold
from fapm.scoring.threshold import (
    KEEP_ALL,
    KEEP_NONE,
    MAX_BINS,
    MAX_KEY,
    ZERO_KEY,
    Bins,
    Bracket,
    Threshold,
    at_the_ends,
    bins_of,
    bracket_from_coarse,
    bracket_from_scores,
    coarse_histogram,
    key_of,
    narrow,
    score_of,
)

# Scores are any float32 but NaN; a negative zero does not occur.
anything = st.floats(width=32, allow_nan=False).map(lambda x: x + 0.0)
few = st.sampled_from([0.0, 1.0, -1.0, np.inf, -np.inf, 1e-45, -1e-45, 1.1754942e-38, -1.1754942e-38, 3.4028235e38])
denormal = st.integers(-3000, 3000).map(lambda n: n * float(np.float32(1e-45)))
scores_of_any_kind = st.sampled_from([anything, few, denormal]).flatmap(
    lambda element: arrays(np.float32, st.integers(1, 80), elements=element)
)


def by_sorting(scores: np.ndarray, k: int) -> Threshold:
    """The k-th highest, and how many of its equals are among the k highest."""
    ordered = np.sort(scores)[::-1]
    kth = ordered[k - 1]
    return Threshold(int(key_of(np.array([kth], np.float32))[0]), k - int((scores > kth).sum()))


def counted(keys: np.ndarray, layout: Bins) -> np.ndarray:
    """Elements in each bin, each key placed by itself."""
    bracket = layout.bracket
    inside = keys[(keys >= bracket.lo) & (keys <= bracket.hi)]
    return np.bincount([layout.place(int(key)) for key in inside], minlength=layout.size).astype(np.int64)


def by_counting(scores: np.ndarray, k: int, bracket: Bracket, max_bins: int) -> tuple[Threshold, int]:
    """The search as a run does it, with integer keys counted by numpy; and how many counts it took."""
    keys = key_of(scores).astype(np.int64)
    for rounds in range(1, 80):
        layout = bins_of(bracket, max_bins)
        assert layout.size <= max_bins or bracket.fine
        assert 0 <= bracket.lo <= bracket.hi <= MAX_KEY
        result = narrow(layout, int((keys > bracket.hi).sum()), counted(keys, layout), k)
        if isinstance(result, Threshold):
            return result, rounds
        bracket = result
    raise AssertionError("the search does not end")


@given(scores_of_any_kind, st.data())
def test_counting_finds_what_sorting_finds_from_any_bracket_with_any_bins(scores, data):
    k = data.draw(st.integers(1, scores.size))
    lo, hi = sorted(data.draw(st.tuples(st.integers(0, MAX_KEY), st.integers(0, MAX_KEY))))
    max_bins = 1 << data.draw(st.integers(1, 16))
    assert by_counting(scores, k, Bracket(lo, hi), max_bins)[0] == by_sorting(scores, k)


@given(scores_of_any_kind, st.data())
def test_a_bracket_at_the_edge_of_some_score_loses_nothing(scores, data):
    k = data.draw(st.integers(1, scores.size))
    key = int(key_of(data.draw(st.sampled_from(list(scores))).reshape(1))[0])
    lo = min(max(key + data.draw(st.integers(-1, 1)), 0), MAX_KEY)
    hi = min(lo + data.draw(st.integers(0, 2)), MAX_KEY)
    assert by_counting(scores, k, Bracket(lo, hi), 256)[0] == by_sorting(scores, k)


@pytest.mark.parametrize("scores", [[5.0] * 7, [0.0] * 7, [-np.inf] * 7, [np.inf] * 7, [0, 0, 0, 1, 1, -1, -1]])
@pytest.mark.parametrize("max_bins", [2, 3, 256, 100_000, MAX_BINS])
def test_every_rank_of_equal_scores(scores, max_bins):
    scores = np.array(scores, np.float32)
    for k in range(1, scores.size + 1):
        assert by_counting(scores, k, Bracket(), max_bins)[0] == by_sorting(scores, k)


def test_two_counts_are_enough_without_any_guess():
    scores = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    found, rounds = by_counting(scores, 10_000, Bracket(), MAX_BINS)
    assert found == by_sorting(scores, 10_000)
    assert rounds == 2


def test_a_sample_makes_one_count_enough():
    scores = np.random.default_rng(0).normal(size=1_000_000).astype(np.float32)
    bracket = bracket_from_scores(scores[::10], 0.1)
    found, rounds = by_counting(scores, 100_000, bracket, MAX_BINS)
    assert found == by_sorting(scores, 100_000)
    assert rounds == 1
    coarse = bracket_from_coarse(coarse_histogram(scores[::10]), 0.1, math.sqrt(0.09 / 100_000))
    found, rounds = by_counting(scores, 100_000, coarse, MAX_BINS)
    assert found == by_sorting(scores, 100_000)
    assert rounds <= 2


@given(scores_of_any_kind, scores_of_any_kind, st.floats(0, 1), st.floats(0, 0.2), st.data())
def test_a_sample_of_something_else_never_changes_the_result(scores, sample, share, sigma, data):
    k = data.draw(st.integers(1, scores.size))
    for bracket in (bracket_from_scores(sample, share), bracket_from_coarse(coarse_histogram(sample), share, sigma)):
        assert 0 <= bracket.lo <= bracket.hi <= MAX_KEY
        assert by_counting(scores, k, bracket, 1 << 10)[0] == by_sorting(scores, k)


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_a_sample_of_the_whole_brackets_the_rank(size):
    scores = np.random.default_rng(size).normal(size=size).astype(np.float32)
    for k in range(1, size + 1, max(1, size // 20)):
        key = by_sorting(scores, k).key
        for bracket in (
            bracket_from_scores(scores, k / size),
            bracket_from_coarse(coarse_histogram(scores), k / size, 0),
        ):
            assert bracket.lo <= key <= bracket.hi


@given(scores_of_any_kind)
def test_keys_have_the_order_of_scores_and_come_back(scores):
    keys = key_of(scores)
    assert keys.dtype == np.uint32
    assert np.array_equal(np.argsort(keys, kind="stable"), np.argsort(scores, kind="stable"))
    assert all(score_of(int(key)).tobytes() == score.tobytes() for key, score in zip(keys, scores, strict=True))


def test_the_key_of_zero():
    assert key_of(np.zeros(1, np.float32))[0] == ZERO_KEY


def test_no_score_lies_at_the_keys_that_keep_all_or_none():
    keys = key_of(np.array([-np.inf, -3.4028235e38, 3.4028235e38, np.inf], np.float32))
    assert KEEP_ALL.key < keys.min()
    assert keys.max() < KEEP_NONE.key
    assert at_the_ends(5, 0) == KEEP_NONE
    assert at_the_ends(5, 5) == KEEP_ALL
    assert at_the_ends(5, 1) is None
    assert at_the_ends(0, 0) == KEEP_NONE


@given(scores_of_any_kind, st.data())
def test_histograms_of_parts_add_up_in_any_order(scores, data):
    k = data.draw(st.integers(1, scores.size))
    cuts = sorted(data.draw(st.lists(st.integers(0, scores.size), max_size=4)))
    parts = data.draw(st.permutations(np.split(scores, cuts)))
    layout = bins_of(Bracket(1 << 30, 3 << 30), 256)
    histogram, above = np.zeros(layout.size, np.int64), 0
    for part in parts:
        keys = key_of(part).astype(np.int64)
        histogram += counted(keys, layout)
        above += int((keys > layout.bracket.hi).sum())
    result = narrow(layout, above, histogram, k)
    if isinstance(result, Bracket):
        result = by_counting(scores, k, result, 256)[0]
    assert result == by_sorting(scores, k)


@pytest.mark.parametrize("bins", [1, 2, 4096, 4097, 5000, 1 << 16, (1 << 16) + 1, (1 << 20) - 1])
def test_the_bin_of_a_rank_in_histograms_of_any_length(bins):
    random = np.random.default_rng(bins)
    histogram = random.integers(0, 3, bins)
    histogram[-1] = 2
    repeated = np.repeat(np.arange(bins), histogram)
    for rank in {1, 2, repeated.size // 2 or 1, repeated.size - 1 or 1, repeated.size}:
        bin_, before = threshold._bin_of_rank(histogram, rank)
        assert bin_ == repeated[rank - 1]
        assert before == int((repeated < bin_).sum())


@given(st.integers(0, MAX_KEY), st.integers(0, MAX_KEY), st.integers(1, 20))
def test_bins_cover_a_bracket_and_are_at_most_as_many_as_allowed(a, b, exponent):
    bracket = Bracket(min(a, b), max(a, b))
    layout = bins_of(bracket, 1 << exponent)
    assert layout.size <= 1 << exponent
    assert layout.place(bracket.hi) == layout.size - 1
    assert layout.shift == 0 or ((bracket.hi - bracket.lo) >> (layout.shift - 1)) + 1 > 1 << exponent


cells = st.integers(0, 2**16 - 1)


@given(cells, st.integers(0, 30), st.sets(st.integers(0, 30), min_size=1, max_size=4), st.data())
def test_fine_cells_count_key_by_key_and_the_others_as_one(first, length, fine, data):
    last = min(first + length, 2**16 - 1)
    fine = tuple(sorted(min(first + cell, last) for cell in fine))
    layout = bins_of(Bracket(first << 16, (last + 1 << 16) - 1, tuple(dict.fromkeys(fine))))
    key = data.draw(st.integers(layout.bracket.lo, layout.bracket.hi))
    lo, hi = layout.keys(layout.place(key))
    assert (lo, hi) == ((key, key) if key >> 16 in fine else (key >> 16 << 16, (key >> 16 << 16) + 2**16 - 1))
    edges = [layout.keys(i) for i in {0, layout.place(key), layout.size - 1}]
    assert sorted(edges)[0][0] == layout.bracket.lo
    assert sorted(edges)[-1][1] == layout.bracket.hi


@given(scores_of_any_kind, st.sets(cells, min_size=1, max_size=3), st.data())
def test_counting_with_any_fine_cells_finds_what_sorting_finds(scores, fine, data):
    k = data.draw(st.integers(1, scores.size))
    bracket = Bracket(min(fine) << 16, (max(fine) + 1 << 16) - 1, tuple(sorted(fine)))
    assert by_counting(scores, k, bracket, MAX_BINS)[0] == by_sorting(scores, k)
