"""Who gave what to a merge: of each layer what every source changes, and where they meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fapm.planning.shards import group_of

OUTSIDE = "outside layers"

Row = dict[str, Any]


def shares_by_layer(rows: Sequence[Row], of_sources: Sequence[Sequence[Row]]) -> list[Row]:
    """Of each layer, in the order of the output, and of what lies in none: how many `elements` it has, how many are
    `changed`, `shared` and `opposed` (as of `shard.table`), and how many each source keeps (`kept`, a list).

    Args:
        rows: the merge's table; `of_sources`: each source's.
    """
    found: dict[str, Row] = {}

    def of(name: str) -> Row:
        layer = group_of(name, "layer")
        layer = OUTSIDE if layer == name else layer
        empty = {"layer": layer, "elements": 0, "changed": 0, "shared": 0, "opposed": 0, "kept": [0] * len(of_sources)}
        return found.setdefault(layer, empty)

    for row in rows:
        if row["pruned_numel"]:
            cell = of(row["name"])
            for key, column in (
                ("elements", "pruned_numel"),
                ("changed", "kept"),
                ("shared", "shared"),
                ("opposed", "opposed"),
            ):
                cell[key] += row[column] or 0
    for i, source in enumerate(of_sources):
        for row in source:
            if row["pruned_numel"]:
                of(row["name"])["kept"][i] += row["kept"] or 0
    return sorted(found.values(), key=lambda cell: _place(cell["layer"]))


def _place(layer: str) -> tuple[bool, str, int]:
    stack, _, number = layer.rpartition(".")
    return layer == OUTSIDE, stack, int(number) if number.isdigit() else 0


HEAD = ("layer", "elements", "changed")


def sources_table(layers: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The same as cells: the head, and a row a layer."""
    count = len(layers[0]["kept"]) if layers else 0
    head = [*HEAD, *(f"of source {i}" for i in range(1, count + 1)), "of several", "opposed"]
    body = []
    for cell in layers:
        changed = max(1, cell["changed"])
        shares = [kept / changed for kept in cell["kept"]] + [cell[key] / changed for key in ("shared", "opposed")]
        whole = f"{cell['elements']:,}", f"{cell['changed'] / max(1, cell['elements']):.1%}"
        body.append([cell["layer"], *whole, *(f"{share:.1%}" for share in shares)])
    return head, body
