"""The engine in torch operations, for GPUs; the same code runs on a CPU, where the tests hold it to the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pipeline.scoring.engine import Applied, Chunk, add_zeros, float_range, float_threshold
from pipeline.scoring.methods import BLOCK, GAMMA, METHODS, UNIT, magnitude, mix
from pipeline.scoring.threshold import ZERO_KEY, Bracket, Threshold


class TorchEngine:
    """Every operation is a kernel of its own, so that each rounds once: nothing is fused or approximated."""

    def __init__(self, method: str, device: str):
        self._method = METHODS[method]
        self._device = torch.device(device)

    def _put(self, array: np.ndarray) -> torch.Tensor:
        if array.dtype.kind == "u" and array.itemsize > 1:
            array = array.view(f"i{array.itemsize}")
        return torch.from_numpy(array).to(self._device)

    def _values(self, array: np.ndarray) -> torch.Tensor:
        put = self._put(array)
        return put.view(torch.bfloat16).to(torch.float32) if array.dtype == np.uint16 else put

    def _scores(self, chunk: Chunk, m: np.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """d in the type of the arithmetic, and S in float32."""
        p, f = self._values(chunk.p), self._values(chunk.f)
        d = (f - p).abs()
        u: Any = None
        if self._method.hashed:
            counter = torch.arange(chunk.start + 1, chunk.start + 1 + p.numel(), device=self._device)
            u = mix(counter * GAMMA + chunk.stream).to(torch.float32) * UNIT
        mean = torch.tensor(float(m), dtype=d.dtype, device=self._device)
        s = (self._method.score or magnitude)(d, p.abs(), mean, u).to(torch.float32) + 0.0
        undefined = torch.where(d == 0, 0.0, -torch.inf).to(torch.float32)
        return d, torch.where(s.isnan(), undefined, s)

    def abs_sums(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        p = self._values(chunk.p).to(torch.float64).abs()
        return _block_sums(p), _block_sums(p.square())

    def count(self, chunk: Chunk, m: np.float32, bracket: Bracket, shift: int, bins: np.ndarray) -> tuple[int, bool]:
        d, s = self._scores(chunk, m)
        lo, hi = (float(x) for x in float_range(bracket))
        inside = s[(s >= lo) & (s <= hi) & (s != 0)].view(torch.int32).to(torch.int64)
        keys = torch.where(inside < 0, ~inside, inside | ZERO_KEY) & 0xFFFFFFFF
        bins += torch.bincount((keys - bracket.lo) >> shift, minlength=bins.size).cpu().numpy()
        add_zeros(int((s == 0).sum()), bracket, shift, bins)
        return int((s > hi).sum()), bool(d.isfinite().all())

    def apply(self, chunk: Chunk, m: np.float32, threshold: Threshold, ties: int, out: np.ndarray) -> Applied:
        score, ties = float_threshold(threshold, ties)
        d, s = self._scores(chunk, m)
        equal = s == float(score)
        keep = (s > float(score)) | (equal & (equal.cumsum(0) <= ties))
        pruned, kept = self._put(chunk.pruned), self._put(chunk.kept)
        torch.from_numpy(out.view(f"i{out.itemsize}") if out.itemsize > 1 else out).copy_(
            torch.where(keep, kept, pruned)
        )
        changed = d != 0
        squares = d.to(torch.float64).square()
        return Applied(
            kept=int(keep.sum()),
            changed=int(changed.sum()),
            kept_changed=int((keep & changed).sum()),
            ties=min(int(equal.sum()), ties),
            squares=_block_sums(squares),
            kept_squares=_block_sums(torch.where(keep, squares, 0.0)),
        )


def _block_sums(x: torch.Tensor) -> np.ndarray:
    whole = x.numel() // BLOCK * BLOCK
    parts = [x[:whole].view(-1, BLOCK).sum(1), x[whole:].sum().view(1)]
    return torch.cat(parts if whole < x.numel() else parts[:1]).cpu().numpy()
