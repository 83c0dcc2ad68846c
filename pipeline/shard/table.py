"""Table of a run: a row a tensor, their sums, and the Parquet file of the rows."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fapm.planning.plan import Group, PairedTensor, Shard, weights_of
from fapm.scoring.threshold import score_of

if TYPE_CHECKING:
    import pyarrow as pa

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

MEASURED = np.dtype(
    [
        ("kept", np.int64),
        ("changed", np.int64),
        ("kept_changed", np.int64),
        ("threshold_key", np.int64),
        ("ties", np.int64),
        ("rank", np.int64),
        ("shared", np.int64),
        ("opposed", np.int64),
        ("mean_abs_base", np.float64),
        ("norm_delta", np.float64),
        ("norm_base", np.float64),
        ("kept_share", np.float64),
        ("seconds", np.float64),
        ("before", np.float64, (len(QUANTILES),)),
        ("after", np.float64, (len(QUANTILES),)),
    ]
)
"""Row of a tensor as a worker has measured it. NaN is what has no meaning for it or no finite value; of one that was
not pruned only `seconds` means something.

Of a merge `kept` are the elements that some source changes, `shared` those that several do, `opposed` those of them
that two move in different directions.

`before` are quantiles of |Δ|/|p| over the elements that fine-tuning changed, `after` over those of them that were kept,
both from a sample. `ties` is the part of its group's tie quota that its shard hands out, `rank` how many singular
values of a matrix are kept.
"""


def change_quantiles(
    p: np.ndarray, f: np.ndarray, scores: np.ndarray, thresholds: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles of |f − p|/|p| of r tensors: over what has changed, and over what of it is kept; (r, 5) each.

    Args:
        p, f, scores: (n,) elements of the tensors, one tensor after the other.
        thresholds: (r,) float32.
        starts: (r + 1,) where each tensor's begin.
    """
    owner = np.repeat(np.arange(starts.size - 1), np.diff(starts))
    with np.errstate(all="ignore"):
        d, size = np.abs(f - p), np.abs(p)
        change = d / size
    threshold = thresholds[owner]
    defined = (d != 0) & (size != 0)
    kept = defined & (scores >= threshold) & (threshold != np.inf)
    return _quantiles(change[defined], owner[defined], starts.size - 1), _quantiles(
        change[kept], owner[kept], starts.size - 1
    )


def _quantiles(values: np.ndarray, owner: np.ndarray, owners: int) -> np.ndarray:
    """Of each owner's values, (owners, 5); NaN where it has none."""
    found = np.full((owners, len(QUANTILES)), np.nan)
    ordered = values[np.lexsort((values, owner))] if owners > 1 else np.sort(values)
    counts = np.bincount(owner, minlength=owners)
    some = counts > 0
    first = (np.cumsum(counts) - counts)[some, None]
    found[some] = ordered[first + (counts[some, None] * np.array(QUANTILES)).astype(np.int64)]
    return finite(found)


def finite(x: np.ndarray) -> np.ndarray:
    """NaN for what is not finite."""
    return np.where(np.isfinite(x), x, np.nan)


def quantile_name(when: str, q: float) -> str:
    return f"change_{when}_q{round(q * 100):02d}"


def totals(tensors: Sequence[PairedTensor], measured: np.ndarray) -> dict[str, Any]:
    """Sums over the rows. Densities are shares of the elements that compete; `effective` counts those that changed.

    Those `of_all` are shares of all weights of the output, and count as fine-tuned also what is taken as it is.
    """
    common = np.array([t.common for t in tensors], np.int64)
    rows = measured[common > 0]
    numel = int(common.sum())
    squares = [norm**2 for norm in rows["norm_delta"].tolist() if not math.isnan(norm)]
    shares = [share for norm, share in zip(rows["norm_delta"], rows["kept_share"], strict=True) if not math.isnan(norm)]
    merged = any(t.operation == "merge" for t in tensors)
    kept_squares = math.fsum(square * share for square, share in zip(squares, shares, strict=True) if square)
    kept, changed, kept_changed, rank = (int(rows[key].sum()) for key in ("kept", "changed", "kept_changed", "rank"))
    weights = weights_of(tensors)
    return {
        "tensors": len(tensors),
        "pruned_tensors": len(rows),
        "pruned_numel": numel,
        "kept": kept,
        "changed": changed,
        "kept_changed": kept_changed,
        "density": kept / numel if numel else None,
        "effective_density": kept_changed / numel if numel else None,
        "kept_share": kept_squares / math.fsum(squares) if math.fsum(squares) and not merged else None,
        "norm_delta": math.sqrt(math.fsum(squares)),
        **({name: int(rows[name].sum()) for name in ("shared", "opposed")} if merged else {}),
        "rank": rank,
        "full_rank": sum(t.full_rank for t in tensors),
        "weights": weights.numel,
        "unpaired": weights.unpaired,
        "density_of_all": (kept + weights.taken) / weights.numel if weights.numel else None,
        "effective_density_of_all": (kept_changed + weights.taken) / weights.numel if weights.numel else None,
    }


def to_parquet(shards: Sequence[Shard], groups: dict[str, Group], measured: np.ndarray) -> bytes:
    """The table as a Parquet file, a row a tensor in the order of the output."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tensors = [t for shard in shards for t in shard.tensors]
    common = np.array([t.common for t in tensors], np.int64)
    pruned = common > 0
    competing = [groups[t.group] if t.group and t.common else None for t in tensors]
    integers, reals = pa.int64(), pa.float64()
    columns: dict[str, pa.Array] = {
        "name": _texts([t.name for t in tensors]),
        "action": _texts([t.action for t in tensors]),
        "dtype": _texts([t.dtype for t in tensors]),
        "shape": _lists([t.shape for t in tensors]),
        "numel": _numbers([t.numel for t in tensors], integers),
        "shard": _texts([shard.name for shard in shards for _ in shard.tensors]),
        "group": _texts([group.name if group else None for group in competing]),
        "density": _numbers([t.parameter for t in tensors], reals, [t.operation == "elements" for t in tensors]),
        "k": _numbers([group.k if group else 0 for group in competing], integers, pruned),
        "full_rank": _numbers([t.full_rank for t in tensors], integers, [t.full_rank > 0 for t in tensors]),
        "pruned_numel": _numbers(common, integers, pruned),
    }
    for key in ("kept", "changed", "kept_changed", "threshold_key", "ties", "rank"):
        columns[key] = _numbers(measured[key], integers, pruned)
    for key in ("shared", "opposed"):
        columns[key] = _numbers(measured[key], integers, [t.operation == "merge" for t in tensors])
    told = {"threshold": score_of(measured["threshold_key"]).astype(np.float64)}
    told |= {key: measured[key] for key in ("mean_abs_base", "norm_delta", "norm_base", "kept_share")}
    told |= {
        quantile_name(when, q): measured[when][:, i] for when in ("before", "after") for i, q in enumerate(QUANTILES)
    }
    columns |= {key: _numbers(values, reals, pruned & np.isfinite(values)) for key, values in told.items()}
    columns["seconds"] = _numbers(measured["seconds"], reals)
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue()


# Columns are made of buffers: `pa.array` would import pandas, if it is there, for a third of a second.


def _numbers(values: Any, kind: pa.DataType, there: Any = None) -> pa.Array:
    """A column of numbers; null where they are not `there`."""
    import pyarrow as pa

    of = np.ascontiguousarray(values, {"int64": np.int64, "double": np.float64}[str(kind)])
    return pa.Array.from_buffers(kind, of.size, [_bits(there), pa.py_buffer(of)])


def _texts(texts: Sequence[str | None]) -> pa.Array:
    import pyarrow as pa

    stored = [(text or "").encode() for text in texts]
    buffers = [_bits([text is not None for text in texts]), _ends(stored), pa.py_buffer(b"".join(stored))]
    return pa.Array.from_buffers(pa.string(), len(texts), buffers)


def _lists(lists: Sequence[Sequence[int]]) -> pa.Array:
    import pyarrow as pa

    items = _numbers([item for one in lists for item in one], pa.int64())
    return pa.Array.from_buffers(pa.list_(pa.int64()), len(lists), [None, _ends(lists)], children=[items])


def _ends(parts: Sequence[Sequence[Any]]) -> pa.Buffer:
    """Where each part begins among all of them, and the last one ends."""
    import pyarrow as pa

    return pa.py_buffer(np.cumsum([0, *map(len, parts)], dtype=np.int32))


def _bits(there: Any) -> pa.Buffer | None:
    import pyarrow as pa

    return None if there is None else pa.py_buffer(np.packbits(np.asarray(there, bool), bitorder="little"))


def from_parquet(data: bytes) -> list[dict[str, Any]]:
    """The rows of a table that was just made. One that is found somewhere is read by `manifest.read_table`."""
    import pyarrow.parquet as pq

    # pyarrow's threads, those that read ahead too, sometimes abort the process at its end: this starts none.
    rows: list[dict[str, Any]] = pq.ParquetFile(io.BytesIO(data), pre_buffer=False).read(use_threads=False).to_pylist()
    return rows
