"""Everything done to a 2048 × 5632 bfloat16 pair in memory, on one core, against copying the same bytes.

    python tests/benchmarks/kernel.py

Mean, score, selection, mask and output, by the compiled loops and by the same steps in torch operations; the floor is
to read both and write one (an exclusive or). The best of several rounds that take turns: the machine is shared.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fapm.scoring.compiled import CpuEngine
from fapm.scoring.engine import Chunk, Engine
from fapm.scoring.methods import METHODS, evaluate
from fapm.scoring.threshold import Threshold, bracket_from_scores, float_thresholds, histograms

sys.path += map(str, Path(__file__).parents[1].glob("support/**/"))
from chunks import torch_engine

SHAPE, DENSITY, ROUNDS = (2048, 5632), 0.1, 9


def pair() -> tuple[np.ndarray, np.ndarray]:
    """Bits of bfloat16: base ~ N(0, 0.02²), Δ ~ N(0, (2e-4)²)."""
    random = torch.Generator().manual_seed(0)
    base = torch.empty(SHAPE).normal_(0, 0.02, generator=random)
    delta = torch.empty(SHAPE).normal_(0, 2e-4, generator=random)
    halves = base.bfloat16(), base.bfloat16().float().add_(delta).bfloat16()
    p, f = (half.view(torch.int16).numpy().view(np.uint16).reshape(-1) for half in halves)
    return p, f


def prune(engine: Engine, p: np.ndarray, f: np.ndarray, out: np.ndarray, size: int = 1 << 20) -> Threshold:
    """The steps of `Worker.write` for one tensor in memory, in chunks of 2^20 elements."""
    spans = [slice(i, min(i + size, p.size)) for i in range(0, p.size, size)]
    zero = np.zeros(1, np.int64)
    chunks = [Chunk(np.array([0, s.stop - s.start]), s.start, zero, p[s], f[s], p[s], f[s]) for s in spans]
    sums = engine.sums()
    for chunk in chunks:
        sums.add(chunk)
    m = np.float32(sum(float(one.sum()) for one, _ in sums.result()) / p.size)
    rows = np.arange(0, p.size // 256, p.size // 256 // 512)
    few_p, few_f = ((x.reshape(-1, 256)[rows].reshape(-1).astype(np.uint32) << 16).view(np.float32) for x in (p, f))
    scores = evaluate(METHODS["fapm"], few_p, few_f, m, 0, np.zeros(0, np.int64))
    k = int(p.size * DENSITY)
    found = bracket_from_scores(scores, DENSITY)
    while not isinstance(found, Threshold):
        counted = histograms([found])
        counting = engine.counting(counted)
        for chunk in chunks:
            counting.add(chunk, m.reshape(1), zero)
        counting.result()
        found = counted.narrow(0, k)
    ties, threshold = np.array([found.ties]), float_thresholds(np.array([found.key]))
    application = engine.application(ties)
    for span, chunk in zip(spans, chunks, strict=True):
        application.add(chunk, m.reshape(1), threshold, zero, out[span])
    application.result()
    return found


def by_sorting(p: np.ndarray, f: np.ndarray) -> torch.Tensor:
    """The authors' way, in float32: a full argsort."""
    base, tuned = (torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).float() for x in (p, f))
    d = (tuned - base).abs()
    score = d - base.abs().mean() * (d / base.abs())
    mask = torch.zeros(p.size, dtype=torch.bool)
    mask[score.argsort(descending=True)[: int(p.size * DENSITY)]] = True
    return torch.where(mask, tuned, base).bfloat16()


def main() -> None:
    torch.set_num_threads(1)
    p, f = pair()
    out = np.empty_like(p)
    ways: dict[str, Callable[[], object]] = {
        "copy (read both, write one)": lambda: np.bitwise_xor(p, f, out=out),
        "compiled loops": lambda: prune(CpuEngine("fapm"), p, f, out),
        "torch operations": lambda: prune(torch_engine("fapm"), p, f, out),
        "argsort of the whole": lambda: by_sorting(p, f),
    }
    best = dict.fromkeys(ways, float("inf"))
    for round_ in range(ROUNDS):
        for name, way in ways.items():
            if round_ < 2 or name in list(ways)[:2]:  # the slow ones need no fine measure
                began = time.perf_counter()
                way()
                best[name] = min(best[name], time.perf_counter() - began)
    floor = best["copy (read both, write one)"]
    print(f"{'':30}{'ms':>9}{'ns/element':>12}{'× copy':>9}")
    for name, seconds in best.items():
        print(f"{name:30}{seconds * 1e3:9.1f}{seconds / p.size * 1e9:12.2f}{seconds / floor:9.1f}")


if __name__ == "__main__":
    main()
