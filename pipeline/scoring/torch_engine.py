"""The engine in torch operations, for GPUs; the same code runs on a CPU, where the tests hold it to the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pipeline.scoring.engine import Applied, Chunk
from pipeline.scoring.methods import BLOCK, GAMMA, METHODS, UNIT, magnitude, mix
from pipeline.scoring.threshold import ZERO_KEY, Histograms


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

    def _scores(self, chunk: Chunk, run: int, m: float) -> tuple[torch.Tensor, torch.Tensor]:
        """d in the type of the arithmetic, and S in float32, of one run."""
        p, f = (self._values(side[_range(chunk, run)]) for side in (chunk.p, chunk.f))
        d = (f - p).abs()
        u: Any = None
        if self._method.hashed:
            counter = torch.arange(chunk.start + 1, chunk.start + 1 + p.numel(), device=self._device)
            u = mix(counter * GAMMA + int(chunk.streams[run])).to(torch.float32) * UNIT
        mean = torch.tensor(m, dtype=d.dtype, device=self._device)
        s = (self._method.score or magnitude)(d, p.abs(), mean, u).to(torch.float32) + 0.0
        undefined = torch.where(d == 0, 0.0, -torch.inf).to(torch.float32)
        return d, torch.where(s.isnan(), undefined, s)

    def _all_scores(self, chunk: Chunk, m: np.ndarray) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        for run in range(chunk.runs):
            yield run, *self._scores(chunk, run, float(m[run]))

    def abs_sums(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        sums = []
        for run in range(chunk.runs):
            p = self._values(chunk.p[_range(chunk, run)]).to(torch.float64).abs()
            sums.append((_block_sums(p), _block_sums(p.square())))
        one, two = zip(*sums, strict=True)
        return np.concatenate(one), np.concatenate(two)

    def select(self, chunk: Chunk, m: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        keys, ties = np.zeros((2, chunk.runs), np.int64)
        for run in np.flatnonzero(k > 0).tolist():
            _, s = self._scores(chunk, run, float(m[run]))
            score = s.sort(descending=True).values[int(k[run]) - 1]
            keys[run], ties[run] = int(_keys(score.view(1))), int(k[run]) - int((s > score).sum())
        return keys, ties

    def count(self, chunk: Chunk, m: np.ndarray, groups: np.ndarray, histograms: Histograms) -> bool:
        finite = True
        for run in np.flatnonzero(groups >= 0).tolist():
            d, s = self._scores(chunk, run, float(m[run]))
            group = int(groups[run])
            lo, hi = float(histograms.lo[group]), float(histograms.hi[group])
            inside = _keys(s[(s >= lo) & (s <= hi)]) - int(histograms.base[group])
            bins, places = histograms.of(group), inside >> int(histograms.shift[group])
            table = int(histograms.tables[group])
            if table >= 0:
                first, mask = (
                    self._put(side[table:].astype(np.int64)) for side in (histograms.cells, histograms.masks)
                )
                places = first[places] + (inside & mask[places])
            bins += torch.bincount(places, minlength=bins.size).cpu().numpy()
            histograms.above[group] += int((s > hi).sum())
            finite &= bool(d.isfinite().all())
        return finite

    def apply(
        self, chunk: Chunk, m: np.ndarray, thresholds: np.ndarray, groups: np.ndarray, ties: np.ndarray, out: np.ndarray
    ) -> Applied:
        signed = out.view(f"i{out.itemsize}") if out.itemsize > 1 else out
        counts, sums = [], []
        for run, d, s in self._all_scores(chunk, m):
            threshold, here = float(thresholds[run]), _range(chunk, run)
            equal = s == threshold
            keep = (s > threshold) | (equal & (equal.cumsum(0) <= int(ties[groups[run]])))
            ties[groups[run]] -= min(int(equal.sum()), int(ties[groups[run]]))
            chosen = torch.where(keep, self._put(chunk.kept[here]), self._put(chunk.pruned[here]))
            torch.from_numpy(signed[here]).copy_(chosen)
            changed = d != 0
            squares = d.to(torch.float64).square()
            counts.append([int(x.sum()) for x in (keep, changed, keep & changed)])
            sums.append((_block_sums(squares), _block_sums(torch.where(keep, squares, 0.0))))
        kept, changed_, both = np.array(counts, np.int64).T
        one, two = zip(*sums, strict=True)
        return Applied(kept, changed_, both, np.concatenate(one), np.concatenate(two))


def _range(chunk: Chunk, run: int) -> slice:
    return slice(int(chunk.starts[run]), int(chunk.starts[run + 1]))


def _keys(scores: torch.Tensor) -> torch.Tensor:
    """Keys (int64) of float32 scores."""
    codes = scores.view(torch.int32).to(torch.int64)
    return torch.where(codes < 0, ~codes, codes | ZERO_KEY) & 0xFFFFFFFF


def _block_sums(x: torch.Tensor) -> np.ndarray:
    whole = x.numel() // BLOCK * BLOCK
    parts = [x[:whole].view(-1, BLOCK).sum(1), x[whole:].sum().view(1)]
    return torch.cat(parts if whole < x.numel() else parts[:1]).cpu().numpy()
