"""The contract (SEMANTICS.md) computed the slow way: whole groups, numpy in the stored precision, and a stable sort."""

from __future__ import annotations

import hashlib
import math
import re
from fnmatch import fnmatchcase

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]


def real(t: torch.Tensor) -> np.ndarray:
    """The flat values: float64 for float64, float32 for every other float."""
    return t.reshape(-1).to(torch.float64 if t.dtype == torch.float64 else torch.float32).numpy()


def mean_of(p: np.ndarray) -> np.float32:
    try:
        total = math.fsum(np.abs(p.astype(np.float64)).tolist())
    except OverflowError:  # what a float64 says of such a sum
        total = math.inf
    with np.errstate(over="ignore"):
        return np.float32(total / p.size)


def uniform(seed: int, name: str, count: int) -> np.ndarray:
    """SplitMix64 in unsigned arithmetic, counted from a digest of seed and name; the upper 24 bits."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    with np.errstate(over="ignore"):
        z = np.frombuffer(digest, "<u8")[0] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(40)).astype(np.float64) * 2.0**-24).astype(np.float32)


def scores(method: str, p: np.ndarray, f: np.ndarray, seed: int = 0, name: str = "") -> np.ndarray:
    """One float32 an element, by the definitions."""
    kind = np.result_type(p, f)
    p, f = p.astype(kind), f.astype(kind)
    if method in ("random", "dare"):
        return uniform(seed, name, p.size)
    with np.errstate(all="ignore"):
        d = np.abs(f - p)
        if method == "magnitude":
            return d.astype(np.float32)
        r = d / np.abs(p)
        s = -r if method == "relative" else d - kind.type(mean_of(p)) * r
        s = np.where(np.isnan(s), -np.inf, s)
        s = np.where(p == 0, -np.inf, s)
        return np.where(d == 0, 0, s).astype(np.float32)


def kept_mask(s: np.ndarray, k: int) -> np.ndarray:
    """The k highest; of equal ones those at the lower positions."""
    mask = np.zeros(s.size, bool)
    mask[np.argsort(-s, kind="stable")[:k]] = True
    return mask


def group_of(name: str, scope: str) -> str:
    if scope == "global":
        return "everything"
    if scope == "layer" and (block := re.match(r"(?:.*?\.)?[^.]*[^.\d][^.]*\.\d+(?=\.)", name)):
        return block[0]
    return name


def prune(
    base: Tensors,
    finetuned: Tensors,
    *,
    method: str = "fapm",
    density: float = 0.1,
    scope: str = "tensor",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    rules: tuple[str, ...] = (),
) -> Tensors:
    """Every tensor of the output. Shapes must agree but for tensors whose rule takes one side."""
    out: Tensors = {}
    groups: dict[str, list[str]] = {}
    densities: dict[str, float] = {}
    for name in sorted(finetuned):
        f, p = finetuned[name], base.get(name)
        action = next((r.rpartition("=")[2] for r in rules if fnmatchcase(name, r.rpartition("=")[0])), "prune")
        target = dtype if dtype and f.is_floating_point() else f.dtype
        if p is None or action == "finetuned" or (action == "prune" and not f.is_floating_point()):
            out[name] = f.to(target)
        elif action == "base":
            out[name] = p.to(target)
        else:
            groups.setdefault(group_of(name, scope), []).append(name)
            densities[name] = density if action == "prune" else float(action)
    for names in groups.values():
        sides = {name: (real(base[name]), real(finetuned[name])) for name in names}
        if method == "wise-ft":
            masks = {name: np.full(p.size, densities[name] > 0) for name, (p, _) in sides.items()}
        else:
            s = np.concatenate([scores(method, p, f, seed, n) if p.size else p[:0] for n, (p, f) in sides.items()])
            ends = np.cumsum([sides[name][0].size for name in names])
            mask = kept_mask(s, budget([(sides[name][0].size, densities[name]) for name in names]))
            masks = dict(zip(names, np.split(mask, ends[:-1]), strict=True))
        for name in names:
            target = dtype or finetuned[name].dtype
            kept = finetuned[name].reshape(-1).to(target)
            if method in ("dare", "wise-ft") and 0 < densities[name] < 1:
                kept = torch.from_numpy(changed_value(method, *sides[name], densities[name])).to(target)
            mask = torch.from_numpy(masks[name])
            pruned = base[name].reshape(-1).to(target)
            where = torch.where(mask, as_bits(kept), as_bits(pruned)).view(target)
            out[name] = where.reshape(finetuned[name].shape)
    return out


def budget(members: list[tuple[int, float]]) -> int:
    """k of a group: elements of each density add up to n_d, and the n_d·d in ascending order of d."""
    total = 0.0
    for density in sorted({d for _, d in members}):
        total = total + sum(n for n, d in members if d == density) * density
    return int(total)


def changed_value(method: str, p: np.ndarray, f: np.ndarray, density: float) -> np.ndarray:
    kind = np.result_type(p, f)
    p, f, a = p.astype(kind), f.astype(kind), kind.type(density)
    with np.errstate(all="ignore"):
        return p + (f - p) / a if method == "dare" else (kind.type(1) - a) * p + a * f


def as_bits(t: torch.Tensor) -> torch.Tensor:
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def authors(base: torch.Tensor, finetuned: torch.Tensor, density: float) -> torch.Tensor:
    """The published script's steps on one tensor: a full descending argsort, its first int(n·density) taken."""
    p, f = base.reshape(-1), finetuned.reshape(-1)
    delta = (f - p).abs()
    importance = delta - p.abs().mean() * (delta / p.abs())
    chosen = torch.argsort(importance, descending=True)[: int(p.numel() * density)]
    out = p.clone()
    out[chosen] = f[chosen]
    return out.reshape(base.shape)
