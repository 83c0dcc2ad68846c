"""Accounts of every tensor that a checkpoint stores: none is lost in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fapm.errors import UserError
from fapm.formats.checkpoint import Checkpoint
from fapm.formats.tensor import Alias, Part, Side, TensorInfo, leaves


@dataclass(frozen=True)
class Account:
    """How many stored tensors are pruned, passed through, made into others, or not taken; and why the rest is left."""

    counts: Mapping[str, int]
    left_out: Mapping[str, str] = field(default_factory=dict)


def account(
    checkpoint: Checkpoint, side: Side, used: Iterable[tuple[str, TensorInfo]], left_out: Mapping[str, str]
) -> Account:
    """Account of the tensors of one side.

    Args:
        used: what becomes of a tensor, and it.
        left_out: why some of the checkpoint's tensors are not used.

    Raises:
        UserError: nothing is known of one.
    """
    known: dict[tuple[str, int, int], str] = {}
    for what, info in used:
        made = info.form is not None and not isinstance(info.form, Alias)
        for leaf in leaves(Part(side, info)):
            if leaf.side == side:
                known.setdefault(_place(leaf.info), "made into others" if made else what)
    reasons = {}
    for info in checkpoint.stored:
        place = _place(info)
        reason = left_out.get(info.name) or checkpoint.gone.get(info.name)
        if place not in known and reason:
            reasons[info.name] = reason
    for name, reason in left_out.items():
        for leaf in leaves(Part(side, checkpoint.tensors[name])) if name in checkpoint.tensors else ():
            if leaf.side == side and _place(leaf.info) not in known:
                reasons[leaf.info.name] = reason
    places = {_place(info) for info in checkpoint.stored if info.name in reasons}
    lost = [
        i for i in checkpoint.stored if _place(i) not in known and _place(i) not in places and i.name not in reasons
    ]
    if lost:
        raise UserError(
            f"{checkpoint.role}: it is not known what should become of {len(lost)} tensor(s): "
            f"{', '.join(info.name for info in lost[:3])}; give rules for them, or convert the checkpoint"
        )
    counts = Counter(known.get(_place(info), "left out") for info in checkpoint.stored)
    return Account(dict(sorted(counts.items())), dict(sorted(reasons.items())))


def _place(info: TensorInfo) -> tuple[str, int, int]:
    return info.file, info.offset, info.nbytes
