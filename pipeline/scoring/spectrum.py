"""Spectra: which part of a matrix the matrix methods keep, as a gain for each of its singular values.

A function of this module is all that a matrix method is (docs/add-a-matrix-method.md): σ, (k,) float64 in descending
order, of an (m, n) matrix, k = min(m, n), and the method's parameter; it returns the gains, (k,) float64.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np


def above_noise(sigma: np.ndarray, shape: tuple[int, int], strength: float) -> np.ndarray:
    """1 for the σ above `strength` times the optimal hard threshold for noise of unknown level, 0 for the others.

    τ = ω(β)·median(σ)/√μ_β, β = min(m, n)/max(m, n). DG-Hard, arXiv 2605.20296; Gavish and Donoho 2014, equation 11.
    """
    beta = min(shape) / max(shape)
    threshold = strength * _omega(beta) * float(np.median(sigma)) / math.sqrt(median_of_noise(beta))
    return (sigma > threshold).astype(np.float64)


def effective_rank(sigma: np.ndarray, shape: tuple[int, int], tail: float) -> np.ndarray:
    """1 for the r largest σ, `tail` for the others: r = ⌈exp(−Σ q·ln q)⌉, q = σ/Σσ. TIMBER, arXiv 2509.23595."""
    total = float(sigma.sum())
    if not total:
        return np.zeros_like(sigma)
    q = sigma[sigma > 0] / total
    rank = math.ceil(math.exp(-float((q * np.log(q)).sum())))
    return np.where(np.arange(sigma.size) < rank, 1.0, tail)


def largest(sigma: np.ndarray, shape: tuple[int, int], rank: float) -> np.ndarray:
    """1 for the `rank` largest σ, 0 for the others: the nearest matrix of that rank. Eckart and Young 1936."""
    return (np.arange(sigma.size) < rank).astype(np.float64) * (sigma > 0)


def _omega(beta: float) -> float:
    """ω(β) of a threshold for known noise, Gavish and Donoho 2014, equation 3."""
    return math.sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + math.sqrt(beta**2 + 14 * beta + 1)))


@lru_cache
def median_of_noise(beta: float) -> float:
    """Median of the Marchenko–Pastur law of ratio β in (0, 1], whose density is √((b − x)(x − a))/(2πβx), a, b =
    (1 ∓ √β)²."""
    a, b = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2

    def below(x: float) -> float:
        """∫ of the density from a to x, by its primitive."""
        root = math.sqrt(max(0.0, (b - x) * (x - a)))
        one = math.asin(max(-1.0, min(1.0, (2 * x - a - b) / (b - a))))
        two = math.asin(max(-1.0, min(1.0, ((a + b) * x - 2 * a * b) / (x * (b - a)))))
        here = root + (a + b) / 2 * one - math.sqrt(a * b) * two
        start = -(a + b) / 2 * math.pi / 2 + math.sqrt(a * b) * math.pi / 2
        return (here - start) / (2 * math.pi * beta)

    low, high = max(a, 1e-300), b
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < 0.5 else (low, middle)
    return (low + high) / 2
