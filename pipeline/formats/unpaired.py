"""Weights of one side without a partner on the other: whether they may stay so, and the rename that would match them.

A new head, or one that was taken off, is a small share of a model and has a shape of its own. Anything else is more
likely the same weight under another name, which would come out wholly fine-tuned.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from fapm.errors import UserError
from fapm.formats.dtypes import is_weight
from fapm.formats.names import rename
from fapm.formats.tensor import TensorInfo

SMALL_SHARE = 0.004
"""Of the elements of a side: half of one layer of the deepest models that are published (126 layers)."""

_MOST_TRIED = 400


def refuse_unpaired(
    alone: Iterable[TensorInfo], added: Iterable[TensorInfo], base_numel: int, finetuned_numel: int
) -> None:
    """Whether weights have no partner that should have one.

    Args:
        alone: what only base has, and nobody has decided about; added: likewise what only finetuned has.
        base_numel: elements of all weights of base; finetuned_numel likewise.

    Raises:
        UserError: two of them would fit each other, or they are more than SMALL_SHARE of their side.
    """
    ours = [info for info in alone if is_weight(info.dtype) and info.numel]
    theirs = [info for info in added if is_weight(info.dtype) and info.numel]
    pair = _fitting(ours, theirs)
    decide = "if it is meant, take them as they are with --unpaired pass or decide them with --rule"
    if pair:
        renaming = suggested(ours, theirs)
        (one, other), how = pair, "has the shape" if pair[0].shape == pair[1].shape else "has as many elements"
        advice = f"if they are the same, say --rename '{renaming}' ({decide})" if renaming else decide
        raise UserError(
            f"{len(theirs)} weight(s) of finetuned and {len(ours)} of base have no partner, and {one.name} of base "
            f"{list(one.shape)} {how} of {other.name} of finetuned {list(other.shape)}; {advice}"
        )
    for side, infos, numel in (("finetuned", theirs, finetuned_numel), ("base", ours, base_numel)):
        share = sum(info.numel for info in infos) / max(1, numel)
        if share > SMALL_SHARE:
            largest = max(infos, key=lambda info: info.numel)
            raise UserError(
                f"{share:.3g} of {side}'s weights ({len(infos)} tensor(s), {largest.name} {list(largest.shape)} the "
                f"largest) have no partner on the other side, so they would "
                + ("stay wholly fine-tuned" if side == "finetuned" else "be left out")
                + f"; give the checkpoints that belong together, match them with --rename FROM=TO, or, {decide}"
            )


def _fitting(ours: Iterable[TensorInfo], theirs: Iterable[TensorInfo]) -> tuple[TensorInfo, TensorInfo] | None:
    """A weight of each side of the same shape, or of the same number of elements; of several the most alike by name."""
    by_shape: dict[tuple[int, ...], list[TensorInfo]] = defaultdict(list)
    by_numel: dict[int, list[TensorInfo]] = defaultdict(list)
    for info in ours:
        by_shape[info.shape].append(info)
        by_numel[info.numel].append(info)
    theirs = list(theirs)
    alike = [(by_shape[t.shape], t) for t in theirs if t.shape in by_shape]
    alike = alike or [(by_numel[t.numel], t) for t in theirs if t.numel in by_numel]
    pairs = ((one, other) for several, other in alike[:_MOST_TRIED] for one in several[:_MOST_TRIED])
    return max(pairs, key=lambda pair: _alike(pair[0].name, pair[1].name), default=None)


def _alike(one: str, other: str) -> int:
    """How many of the last parts of two names are the same, and of the first."""
    ours, theirs = one.split("."), other.split(".")
    return 2 * _common(ours[::-1], theirs[::-1]) + _common(ours, theirs)


def _common(ours: list[str], theirs: list[str]) -> int:
    count = 0
    for a, b in zip(ours, theirs, strict=False):
        if a != b:
            break
        count += 1
    return count


def refuse_strangers(base: Mapping[str, TensorInfo], finetuned: Mapping[str, TensorInfo]) -> None:
    """Say why two checkpoints have no name in common.

    Raises:
        UserError: always.
    """
    renaming = suggested(base.values(), finetuned.values())
    advice = f"if they are, say --rename '{renaming}'" if renaming else "give the checkpoints that belong together"
    raise UserError(
        f"base and finetuned have no tensor name in common (base has {_few(base)}, finetuned has {_few(finetuned)}): "
        f"these are not two versions of one model; {advice}"
    )


def _few(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (", …" if len(listed) > 3 else "") or "none"


def suggested(ours: Iterable[TensorInfo], theirs: Iterable[TensorInfo]) -> str:
    """The `--rename` that matches most weights of the same shape, which all agree in their last parts; or nothing."""
    names: Mapping[str, tuple[int, ...]] = {info.name: info.shape for info in theirs}
    ends: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for name, shape in names.items():
        ends[name.rpartition(".")[2], shape].append(name)
    base = list(ours)
    tried: Counter[str] = Counter()
    for info in base[:_MOST_TRIED]:
        for name in ends.get((info.name.rpartition(".")[2], info.shape), ())[:_MOST_TRIED]:
            tried.update(filter(None, (_beginnings(info.name, name), _difference(info.name, name))))
    best, most = "", 0
    for text, _ in tried.most_common(20):
        moved = [(rename(text, info.name), info.shape) for info in base]
        matched = sum(1 for name, shape in moved if name and names.get(name) == shape)
        wrong = sum(1 for name, shape in moved if name and name in names and names[name] != shape)
        if matched > most and not wrong:
            best, most = text, matched
    return best


def _beginnings(one: str, other: str) -> str:
    """The rename of beginnings that makes one name another, the same last parts left."""
    ours, theirs = one.split("."), other.split(".")
    last = min(_common(ours[::-1], theirs[::-1]), len(ours), len(theirs))
    before, after = ("".join(f"{part}." for part in parts[: len(parts) - last]) for parts in (ours, theirs))
    return f"{before}={after}" if last and before != after else ""


def _difference(one: str, other: str) -> str:
    """The rename that makes one name another by one exchange of whole parts; nothing if no part would be left."""
    ours, theirs = one.split("."), other.split(".")
    first = _common(ours, theirs)
    last = min(_common(ours[::-1], theirs[::-1]), len(ours) - first, len(theirs) - first)
    before, after = ".".join(ours[first : len(ours) - last]), ".".join(theirs[first : len(theirs) - last])
    if not first:
        return ""  # _beginnings
    if not last:
        return f"*.{before}=*.{after}"
    kept = ours[len(ours) - last]
    if not before or not after:  # a part that one of them does not have: what follows says where
        before, after = ".".join([before, kept]).strip("."), ".".join([after, kept]).strip(".")
        return f"*.{before}.*=*.{after}.*" if last > 1 else f"*.{before}=*.{after}"
    return f"*.{before}.*=*.{after}.*"
