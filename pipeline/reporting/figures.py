"""Figures of the page, drawn by matplotlib as SVG.

Their colours are variables of the page, so that one figure is legible in light, in dark and in print; series differ in
marker and line too, for who does not see the colours. All that comes from a checkpoint is escaped.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fapm.choosing.choice import bound_of, front
from fapm.choosing.skills import Measure, Point
from fapm.errors import UserError
from fapm.scoring.methods import METHODS

_INK, _LINE = "#010203", "#040506"
_SERIES = tuple(f"#0{i}0a0b" for i in range(6))
"""Colours that stand for variables of the page."""

_VARIABLES = {_INK: "--ink", _LINE: "--line"} | {c: f"--s{i}" for i, c in enumerate(_SERIES)}


@contextmanager
def drawing() -> Iterator[None]:
    """The style in which figures are drawn.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise UserError("--html needs matplotlib: pip install 'fapm[page]'") from None
    with mpl.rc_context(_RC):
        yield


@dataclass(frozen=True)
class Figure:
    """A figure as SVG inside a page, and the same in words."""

    svg: str
    told: str


def embedded(drawn: Any, name: str, title: str, told: str, points: Mapping[str, str] | None = None) -> Figure:
    """A figure of matplotlib as SVG inside the page, with its text alternative.

    Args:
        points: what is said where the mouse is over a point, by its gid.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        metadata = {"Date": None, "Creator": None}
        drawn.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<image\b[^>]*?) id="image\w+"', r"\1", svg)  # two of one content have one name
    for gid, said in (points or {}).items():
        svg = svg.replace(f'<g id="{gid}">', f'<g id="{gid}"><title>{html.escape(said)}</title>', 1)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = svg.replace("<svg ", f'<svg role="img" aria-labelledby="{name}-title {name}-told" ', 1)
    end = svg.index(">") + 1
    of_it = f'<title id="{name}-title">{html.escape(title)}</title><desc id="{name}-told">{html.escape(told)}</desc>'
    return Figure(f"{svg[:end]}{of_it}{svg[end:]}", told)


_RC: Any = {
    "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.edgecolor": _INK,
    "grid.color": _LINE, "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "font.size": 10, "text.parse_math": False, "legend.frameon": False,
    "legend.labelcolor": _INK, "axes.facecolor": "none",
}  # fmt: skip


def _axes(width: float, height: float, count: int = 1) -> tuple[Any, Any]:
    """A figure that belongs to no window, and its axes side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


_MARKERS, _LINES = "osD^vP", ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
_BESIDE = ((7, 5), (7, -13), (-7, 5), (-7, -13), (0, 9), (0, -17), (14, -4), (-14, -4))
"""Places of a label beside its point, in points; the first at which it meets no other is taken."""


def value_of(row: Mapping[str, Any]) -> float:
    """The parameter of a candidate's method."""
    return float(row[METHODS[row["method"]].parameter])


def _methods(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The candidates of each curve, by their rising parameter."""
    scopes: dict[str, set[str]] = {}
    listed = [row for row in rows if "method" in row]
    for row in listed:
        scopes.setdefault(row["method"], set()).add(row["scope"])
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(listed, key=value_of):
        several = len(scopes[row["method"]]) > 1
        curves.setdefault(f"{row['method']} ({row['scope']})" if several else row["method"], []).append(row)
    return dict(sorted(curves.items()))


def _place(row: dict[str, Any]) -> tuple[float, float, float, float]:
    """Retained and forgetting in percent, and their standard errors."""
    x, y = row["retained"], row["forgetting"]
    return 100 * x["value"], 100 * y["value"], 100 * (x["stderr"] or 0), 100 * (y["stderr"] or 0)


def _unbroken(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """A line through points, with a gap where it would turn back."""
    xs, ys = [x[0]], [y[0]]
    for i in range(1, len(x)):
        if x[i] < x[i - 1]:
            xs.append(math.nan)
            ys.append(math.nan)
        xs.append(x[i])
        ys.append(y[i])
    return xs, ys


def trade_off(rows: Sequence[dict[str, Any]], chosen: str = "", how: str = "") -> Figure:
    """Each checkpoint by what it retains of the new skill and has forgotten of the old one.

    Args:
        rows: those of which both is known; base and finetuned among them.
        how: the rule by which one was chosen, whose bound is drawn.
    """
    figure, (axes,) = _axes(8.5, 5.4)
    labels: list[tuple[str, float, float, str]] = []
    said: dict[str, str] = {}
    axes.axvline(100, color=_INK, linewidth=1, linestyle=(0, (1, 3)), label="all of the new skill")
    axes.axhline(0, color=_INK, linewidth=1, linestyle=(0, (3, 3)), label="nothing forgotten")
    rule = bound_of(how)
    if rule:
        axis, bound = rule
        draw = axes.axvline if axis == "retained" else axes.axhline
        draw(100 * bound, color=_INK, linewidth=1.2, linestyle="-.", label=f"{axis} {100 * bound:g} %")
    for i, (name, found) in enumerate(_methods(rows).items()):
        x, y, dx, dy = zip(*map(_place, found), strict=True)
        axes.plot(*_unbroken(x, y), color=_SERIES[i % 6], linestyle=_LINES[(i + i // 6) % 6], linewidth=1.5)
        for row, at_x, at_y, off_x, off_y in zip(found, x, y, dx, dy, strict=True):
            gid = f"point-{len(said)}"
            said[gid] = _told(row)
            axes.errorbar(
                at_x, at_y, xerr=off_x or None, yerr=off_y or None, color=_SERIES[i % 6], marker=_MARKERS[i % 6],
                markersize=6, capsize=2, linewidth=1, linestyle="none", label=name if row is found[0] else None,
            ).lines[0].set_gid(gid)  # fmt: skip
            labels.append((f"{value_of(row):g}", at_x, at_y, _SERIES[i % 6]))
    for row in rows:
        if "method" not in row:
            at = _place(row)
            gid = f"point-{len(said)}"
            said[gid] = _told(row)
            axes.errorbar(
                at[:1], at[1:2], xerr=at[2:3], yerr=at[3:], marker="*" if row["name"] == "base" else "X",
                color=_INK, markersize=11, linestyle="none", capsize=2,
            ).lines[0].set_gid(gid)  # fmt: skip
            labels.append((row["name"], at[0], at[1], _INK))
        elif row["name"] == chosen:
            at = _place(row)
            axes.plot(
                at[:1], at[1:2], marker="o", markersize=17, markerfacecolor="none", markeredgecolor=_INK,
                linestyle="none", markeredgewidth=1.5, label="chosen",
            )  # fmt: skip
    best = _front(rows)
    if len(best) > 1:
        axes.plot(*zip(*best, strict=True), color=_INK, linewidth=4, alpha=0.15, zorder=0, label="the front")
    axes.margins(0.08)
    _label(figure, axes, labels)
    axes.set_xlabel("retained: new skill, % of finetuned's (more is better)")
    axes.set_ylabel("forgetting: old skill lost, % of base's (less is better)")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    told = (
        "Each candidate by what it retains of the new skill and has forgotten of the old one: right and down is better."
        " A curve is a method over its parameter, with a gap where it turns back; bars are one standard error, the "
        f"broad line is the front. {'; '.join(_ends(rows))}."
    )
    told += f" Chosen: {chosen}." if chosen else ""
    return embedded(figure, "trade-off", "The trade-off between the new skill and the old one", told, said)


def _told(row: dict[str, Any]) -> str:
    x, y, dx, dy = _place(row)
    return f"{row['name']}: retained {x:.1f} % ±{dx:.1f}, forgetting {y:.1f} % ±{dy:.1f}"


def _front(rows: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    found = {
        row["name"]: Point(
            row["name"], None, None, Measure(row["retained"]["value"]), Measure(row["forgetting"]["value"])
        )
        for row in rows
        if row["name"] not in ("base", "finetuned")
    }
    by_name = {row["name"]: row for row in rows}
    return [_place(by_name[point.name])[:2] for point in front(found)]


def _label(figure: Any, axes: Any, labels: Sequence[tuple[str, float, float, str]]) -> None:
    """Labels beside their points, each where it meets no other label and no point."""
    figure.draw_without_rendering()
    points = [axes.transData.transform((x, y)) for _, x, y, _ in labels]
    taken = [(px - 4, py - 4, px + 4, py + 4) for px, py in points]
    for (text, x, y, colour), (px, py) in zip(labels, points, strict=True):
        wide = 6.0 * len(text) + 2

        def box(
            dx: float, dy: float, px: float = px, py: float = py, wide: float = wide
        ) -> tuple[float, float, float, float]:
            scale = figure.dpi / 72
            left = px + dx * scale - (0 if dx > 0 else wide if dx < 0 else wide / 2)
            return left, py + dy * scale, left + wide, py + dy * scale + 11

        def meets(dx: float, dy: float, box: Any = box) -> int:
            a = box(dx, dy)
            return sum(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in taken)

        dx, dy = min(_BESIDE, key=lambda at: meets(*at))
        taken.append(box(dx, dy))
        side = "left" if dx > 0 else "right" if dx < 0 else "center"
        axes.annotate(
            text, (x, y), xytext=(dx, dy), textcoords="offset points", fontsize=8, color=colour, ha=side, va="bottom"
        )


def _ends(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Where the curve of each method begins and ends."""
    found = []
    for name, of in _methods(rows).items():
        ends = [of[0], of[-1]] if len(of) > 1 else of
        symbol = METHODS[of[0]["method"]].symbol
        found.append(
            f"{name} "
            + " to ".join(
                f"{row['retained']['value']:.1%} retained and {row['forgetting']['value']:.1%} forgotten at "
                f"{symbol} {value_of(row):g}"
                for row in ends
            )
        )
    return found


def by_parameter(rows: Sequence[dict[str, Any]], skill: str) -> Figure:
    """One skill of each candidate, where the other is not known."""
    figure, (axes,) = _axes(8.5, 4.5)
    for i, (method, found) in enumerate(_methods([row for row in rows if row.get(skill)]).items()):
        axes.errorbar(
            [value_of(row) for row in found], [row[skill]["value"] for row in found],
            yerr=[row[skill]["stderr"] or 0 for row in found], label=method, color=_SERIES[i % 6],
            marker=_MARKERS[i % 6], linestyle=_LINES[i % 6], capsize=2,
        )  # fmt: skip
    for side, line in (("base", ":"), ("finetuned", "--")):
        row = next((row for row in rows if row["name"] == side), {})
        if row.get(skill):
            axes.axhline(row[skill]["value"], color=_INK, linestyle=line, linewidth=1, label=side)
    axes.set_xlabel("density, α, strength or tail")
    axes.set_ylabel(f"{skill} skill")
    axes.legend(loc="best", fontsize=9)
    told = f"The {skill} skill of each candidate. The table has the numbers."
    return embedded(figure, "skill", f"The {skill} skill by density", told)


def _short(layers: Sequence[str]) -> list[str]:
    """The layers' numbers alone, where there is only one stack."""
    stacks = {name.rpartition(".")[0] for name in layers}
    return [name.rpartition(".")[2] if len(stacks) == 1 else name for name in layers]


def kept(layers: Sequence[str], kinds: Sequence[str], grids: Mapping[str, np.ndarray]) -> Figure | None:
    """What was kept, by layer and kind of module, in percent; None where all of it is the same by construction.

    Args:
        grids: (layers, kinds) float64 shares by what they are of; NaN where there is nothing.
    """
    grids = {title: grid for title, grid in grids.items() if np.nanmax(grid) - np.nanmin(grid) > 0.005}
    if not grids:
        return None
    figure, axes = _axes(5.2 * len(grids), min(14.0, 1.6 + 0.3 * len(kinds)), len(grids))
    shown = _short(layers)
    for number, (one, (title, grid)) in enumerate(zip(axes, grids.items(), strict=True)):
        one.grid(False)
        highest = 10.0 * max(1, math.ceil(10 * np.nanmax(grid, initial=0)))
        mesh = one.pcolormesh(
            np.ma.masked_invalid(100 * grid.T),
            cmap="cividis",
            vmin=0,
            vmax=highest,
            edgecolors="none",
            rasterized=False,
        )
        one.set_title(f"{title}, %", fontsize=10)
        step = max(1, len(shown) // 12)
        one.set_xticks(np.arange(0, len(shown), step) + 0.5, shown[::step], rotation=90 if len(shown[0]) > 3 else 0)
        one.set_yticks(np.arange(len(kinds)) + 0.5, [_cut(kind) if number == 0 else "" for kind in kinds])
        one.invert_yaxis()
        one.set_xlabel("layer")
        if grid.size <= 120:
            for (i, j), value in np.ndenumerate(100 * grid):
                if not np.isnan(value):
                    one.text(i + 0.5, j + 0.5, f"{value:.0f}", ha="center", va="center", fontsize=8,
                             color="#ffffff" if value < 0.55 * highest else "#000000")  # fmt: skip
        figure.colorbar(mesh, ax=one, label="%", shrink=0.9)
    said = [
        f"{title}: {'; '.join(f'{kind} {_span(grid[:, i])}' for i, kind in enumerate(kinds))}"
        for title, grid in grids.items()
    ]
    told = f"By layer, from the first to the last, and kind of module. {'. '.join(said)}."
    return embedded(figure, "kept", "What was kept, by layer and kind of module", told)


def _cut(name: str, most: int = 36) -> str:
    """A label that leaves room for the figure."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _span(values: np.ndarray) -> str:
    known = values[~np.isnan(values)]
    if not known.size:
        return "nothing"
    low, high = float(known.min()), float(known.max())
    return f"{low:.0%}" if f"{low:.0%}" == f"{high:.0%}" else f"{low:.0%} to {high:.0%}"


def moves(layers: Sequence[str], moved: np.ndarray) -> Figure:
    """How far each layer has moved: (layers, 2) float64 ‖Δ‖ / ‖W‖ of fine-tuning, and of what was kept."""
    figure, (axes,) = _axes(8.5, 3.6)
    places = np.arange(len(layers))
    for i, label in enumerate(("fine-tuning", "what was kept of it")):
        axes.plot(places, moved[:, i], color=_SERIES[i], marker=_MARKERS[i], linestyle=_LINES[i], label=label)
    step = max(1, len(layers) // 16)
    shown = _short(layers)
    axes.set_xticks(places[::step], shown[::step], rotation=90 if len(shown[0]) > 3 else 0)
    axes.set_xlabel("layer")
    axes.set_ylabel("‖Δ‖ / ‖W‖")
    axes.set_ylim(bottom=0)
    axes.legend(loc="best", fontsize=9)
    least, most = int(np.argmin(moved[:, 0])), int(np.argmax(moved[:, 0]))
    told = (
        f"‖Δ‖ / ‖W‖ of fine-tuning, and of what was kept of it. Fine-tuning moved {layers[most]} most, by "
        f"{moved[most, 0]:.2e}, and {layers[least]} least, by {moved[least, 0]:.2e}."
    )
    return embedded(figure, "moved", "How far each layer has moved", told)
