"""Singular values by Gram matrices against numpy's and torch's SVD in the same run, one thread each.

python tests/benchmarks/matrices.py [SIZE…]      sizes like 1024x1024 4096x1024
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fapm.scoring.matrices import Delta, decompose, flops_of, flops_per_second, kept, one_thread, projector, rows_of


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    done = work()
    return time.perf_counter() - wall, time.process_time() - cpu, done


def ours(p: np.ndarray, f: np.ndarray) -> np.ndarray:
    rows = rows_of(p.shape)
    delta = Delta(p.shape, lambda first: ((i, p[i : i + rows], f[i : i + rows]) for i in range(first, len(p), rows)))
    found = decompose(delta)
    for _ in kept(delta, projector(found, np.arange(found.sigma.size) < found.sigma.size // 8)):
        pass
    return found.sigma


def main() -> None:
    torch.set_num_threads(1)
    rate = flops_per_second(1024)
    print(f"a matrix product: {rate / 1e9:.1f} Gflop/s; wall seconds, CPU seconds in brackets")
    for size in sys.argv[1:] or ("512x512", "1024x1024", "2048x1024", "1024x2048", "2048x2048"):
        shape = tuple(map(int, size.split("x")))
        rng = np.random.default_rng(0)
        p = rng.standard_normal(shape, np.float32)
        f = p + 0.01 * rng.standard_normal(shape, np.float32)
        d = (f - p).astype(np.float64)
        with one_thread:
            wall, cpu, sigma = timed(lambda p=p, f=f: ours(p, f))
            of_numpy, cpu_numpy, (_, exact, _) = timed(lambda d=d: np.linalg.svd(d, full_matrices=False))
            of_torch, cpu_torch, _ = timed(lambda d=d: torch.linalg.svd(torch.from_numpy(d), full_matrices=False))
        off = np.abs(sigma - exact).max() / exact[0]
        print(
            f"{size}: {wall:.2f} ({cpu:.2f}), told {flops_of(shape) / rate:.2f}; numpy's SVD {of_numpy:.2f} "
            f"({cpu_numpy:.2f}), torch's {of_torch:.2f} ({cpu_torch:.2f}); {of_numpy / wall:.1f} and "
            f"{of_torch / wall:.1f} times ours; σ off by {off:.0e} of the largest"
        )


if __name__ == "__main__":
    main()
