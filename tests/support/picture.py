"""The picture of the README: the product's own figure of the measured table in docs/choosing.md.

python tests/support/picture.py docs/choosing.md docs/trade-off.svg
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from fapm.reporting import figures

LIGHT = {"ink": "#1b1f24", "line": "#c4c9d0", "s0": "#0072b2", "s1": "#c8500a", "s2": "#007d5c"}


def rows_of(page: str) -> list[dict[str, Any]]:
    """The checkpoints of the first table that has what they retain and forget."""
    found = []
    number = r"(-?[\d.]+) ±([\d.]+)"
    for name, retained, stderr, forgetting, of_that in re.findall(
        rf"^\| ([\w.-]+) \|.*\| {number} \| {number} \|$", page, re.MULTILINE
    ):
        row: dict[str, Any] = {
            "name": name,
            "retained": {"value": float(retained), "stderr": float(stderr)},
            "forgetting": {"value": float(forgetting), "stderr": float(of_that)},
        }
        if name in (one["name"] for one in found):
            break  # the next table
        method, _, density = name.rpartition("-")
        found.append(row | ({"method": method, "scope": "tensor", "density": float(density)} if method else {}))
    return found


def draw(page: str) -> str:
    with figures.drawing():
        svg = figures.trade_off(rows_of(page), "fapm-0.1", "retained>=0.95").svg
    for name, colour in LIGHT.items():
        svg = svg.replace(f"var(--{name})", colour)
    end = svg.index(">") + 1
    return f'{svg[:end]}<rect width="100%" height="100%" fill="#ffffff"/>{svg[end:]}\n'


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(draw(Path(sys.argv[1]).read_text()))
