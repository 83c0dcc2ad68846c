"""What is told of a run afterwards: a row a tensor, their sums, and the Parquet table of the rows."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.plan import Group, PairedTensor
from pipeline.scoring.threshold import KEEP_ALL, Threshold, score_of

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


Seen = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Scores, d and |p| of some elements of a tensor."""


@dataclass(slots=True)
class Tally:
    """What has been counted of a tensor: mean |p|, Σp², counts of elements, Σd² of each block.

    `overflowed` are elements of the output that rounding made infinite.
    """

    mean: float = 0.0
    base_squares: float = 0.0
    kept: int = 0
    changed: int = 0
    kept_changed: int = 0
    overflowed: int = 0
    squares: list[np.ndarray] = field(default_factory=list)
    kept_squares: list[np.ndarray] = field(default_factory=list)

    @property
    def m(self) -> np.float32:
        """mean |p| as the score uses it."""
        return np.float32(self.mean)


def plain_row(tensor: PairedTensor, shard: str, seconds: float) -> dict[str, Any]:
    """The row of a tensor that was not pruned."""
    return {
        "name": tensor.name, "action": tensor.action, "dtype": tensor.dtype, "shape": list(tensor.shape),
        "shard": shard, "numel": tensor.numel, "seconds": round(seconds, 6),
    }  # fmt: skip


def pruned_row(tensor: PairedTensor, group: Group, tally: Tally, threshold: Threshold, seen: Seen) -> dict[str, Any]:
    """What the row of a pruned tensor has beside that; what has no meaning for it is None.

    `change_before_q50` is the median of |Δ|/|p| over the elements that fine-tuning changed, `change_after_q50`
    over those of them that were kept; both from a sample.
    """
    squares, kept_squares = exact_sum(tally.squares), exact_sum(tally.kept_squares)
    score = score_of(threshold.key)
    row: dict[str, Any] = {
        "group": group.name, "k": group.k, "pruned_numel": tensor.common,
        "kept": tally.kept, "changed": tally.changed, "kept_changed": tally.kept_changed,
        "threshold": float(score) if math.isfinite(score) else None,
        "threshold_key": threshold.key, "ties": threshold.ties,
        "mean_abs_base": _finite(tally.mean), "norm_delta": _finite(math.sqrt(squares)),
        "norm_base": _finite(math.sqrt(tally.base_squares)),
        "kept_share": _finite(kept_squares / squares) if squares else None,
    }  # fmt: skip
    scores, d, p = seen
    defined = (d != 0) & (p != 0)
    kept = defined & (scores >= score if math.isfinite(score) else threshold == KEEP_ALL)
    with np.errstate(all="ignore"):
        change = d / p
    for when, chosen in (("before", defined), ("after", kept)):
        ordered = np.sort(change[chosen])
        for q in QUANTILES:
            row[_quantile(when, q)] = _finite(float(ordered[int(q * ordered.size)])) if ordered.size else None
    return row


def exact_sum(blocks: list[np.ndarray]) -> float:
    """The sum of all elements, rounded once; infinite if it is too large for a float64."""
    try:
        return math.fsum(np.concatenate(blocks).tolist())
    except OverflowError:
        return math.inf


def _finite(x: float) -> float | None:
    """What JSON can say."""
    return x if math.isfinite(x) else None


def _quantile(when: str, q: float) -> str:
    return f"change_{when}_q{round(q * 100):02d}"


def totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over the rows. Densities are shares of the elements that compete; `effective` counts those that changed."""
    pruned = [r for r in rows if r.get("pruned_numel")]
    numel = sum(r["pruned_numel"] for r in pruned)
    known = [r for r in pruned if r["norm_delta"] is not None]
    squares = math.fsum(r["norm_delta"] ** 2 for r in known)
    kept_squares = math.fsum(r["norm_delta"] ** 2 * (r["kept_share"] or 0) for r in known)
    kept, changed, kept_changed = (sum(r[key] for r in pruned) for key in ("kept", "changed", "kept_changed"))
    return {
        "tensors": len(rows),
        "pruned_tensors": len(pruned),
        "pruned_numel": numel,
        "kept": kept,
        "changed": changed,
        "kept_changed": kept_changed,
        "density": kept / numel if numel else None,
        "effective_density": kept_changed / numel if numel else None,
        "kept_share": kept_squares / squares if squares else None,
        "norm_delta": math.sqrt(squares),
    }


def to_parquet(rows: list[dict[str, Any]]) -> bytes:
    """The table as a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    integers = ("numel", "k", "pruned_numel", "kept", "changed", "kept_changed", "threshold_key", "ties")
    reals = ["threshold", "mean_abs_base", "norm_delta", "norm_base", "kept_share", "seconds"]
    reals += [_quantile(when, q) for when in ("before", "after") for q in QUANTILES]
    fields = [pa.field(name, pa.string()) for name in ("name", "action", "dtype", "shard", "group")]
    fields.append(pa.field("shape", pa.list_(pa.int64())))
    fields += [pa.field(name, pa.int64()) for name in integers]
    fields += [pa.field(name, pa.float64()) for name in reals]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(fields)), sink, compression="zstd")
    return sink.getvalue()


def from_parquet(data: bytes) -> list[dict[str, Any]]:
    """The rows of a table."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(data)).to_pylist()
    return rows
