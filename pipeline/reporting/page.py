"""An output as one HTML file to look at, that needs no network: the trade-off of a sweep, what was kept where, how far
each layer has moved, tables of the same, and the commands.

Figures are drawn by matplotlib as SVG. Their colours are variables of the page, so that one figure is legible in light,
in dark and in print; series differ in marker and line too, for who does not see the colours. All that comes from a
checkpoint is escaped.
"""

from __future__ import annotations

import html
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fapm.choosing.skills import AXES, DEFINITIONS
from fapm.choosing.sweep import read_sweep
from fapm.errors import UserError
from fapm.layout import MANIFEST, SWEEP
from fapm.manifest.read import load_manifest, read_table
from fapm.planning.shards import group_of
from fapm.recipe import format_bytes
from fapm.reporting.facts import run_facts
from fapm.reporting.text import kept_text, measure_text, run_text
from fapm.storage.address import inside, open_store
from fapm.storage.local import plain_errors

_INK, _LINE = "#010203", "#040506"
_SERIES = tuple(f"#0{i}0a0b" for i in range(6))
"""Colours that stand for variables of the page."""

_VARIABLES = {_INK: "--ink", _LINE: "--line"} | {c: f"--s{i}" for i, c in enumerate(_SERIES)}

# Okabe and Ito's colours, that people with any colour vision tell apart, darkened or lightened for the ground.
_STYLE = """
:root { --ink: #1b1f24; --line: #c4c9d0; --paper: #ffffff; --soft: #f3f5f7; color-scheme: light dark;
  --s0: #0072b2; --s1: #c8500a; --s2: #007d5c; --s3: #a8497f; --s4: #8a6d00; --s5: #4a4f57; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --line: #4a5058; --paper: #15181c; --soft: #20252b;
  --s0: #56b4e9; --s1: #f0883e; --s2: #2ec99d; --s3: #e08bbd; --s4: #e6c229; --s5: #b4bac2; } }
@media print { :root { --ink: #000000; --line: #bbbbbb; --paper: #ffffff; --soft: #ffffff;
  --s0: #0072b2; --s1: #c8500a; --s2: #007d5c; --s3: #a8497f; --s4: #8a6d00; --s5: #4a4f57; }
  figure, table { break-inside: avoid; } }
body { margin: 2rem auto; max-width: 66rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
figure { margin: 1rem 0; overflow-x: auto; } figcaption { max-width: 45rem; }
svg { max-width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .875rem; }
th, td { padding: .25rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child, td.note { text-align: left; }
tr.chosen td { font-weight: 600; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; border: 1px solid var(--line); }
"""


def page(out: str) -> str:
    """The page of a finished output, of a sweep, or of both.

    Raises:
        UserError: the folder holds neither, or matplotlib is missing.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise UserError("--html needs matplotlib: pip install 'fapm[page]'") from None
    with mpl.rc_context(_RC):
        return _page(out)


def write_page(out: str, file: Path) -> int:
    """Write the page through no link, so that it is there as a whole or not at all; returns its bytes.

    Raises:
        UserError: there is nothing to show, or the file cannot be written.
    """
    written = page(out).encode()
    with plain_errors(file):
        before = file.with_name(f".{file.name}.{os.getpid()}")
        with open(before, "xb") as made:
            made.write(written)
        before.replace(file)
    return len(written)


def _page(out: str) -> str:
    folder = inside(out, SWEEP)
    swept = read_sweep(folder)
    has_output = open_store(out).has(MANIFEST)
    if not swept and not has_output:
        load_manifest(out)  # says what is there instead
    parts: list[str] = []
    if swept:
        parts += _of_sweep(swept, out)
    about, name = out, ""
    if not has_output and swept:
        first = swept["candidates"][0]["name"]
        about, name = inside(folder, first), f" in {first}, the first candidate"
    made = load_manifest(about)
    parts += _of_output(made, read_table(about), about, name)
    title = f"fapm: {out}"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{_e(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{_e(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _e(text: Any) -> str:
    return html.escape(str(text))


# The parts.


def _of_sweep(swept: dict[str, Any], out: str) -> list[str]:
    rows = [{"name": side, **swept[side]} for side in ("base", "finetuned")] + swept["candidates"]
    with_both = [row for row in rows if row.get("retained") and row.get("forgetting")]
    parts = ["<h2>The trade-off</h2>"]
    if any(row["name"] not in ("base", "finetuned") for row in with_both):
        parts.append(_figure(_trade_off(with_both, swept), "trade-off", *_told_trade_off(with_both, swept)))
    elif any(row.get("new") or row.get("old") for row in rows):
        skill = "new" if any(row.get("new") for row in rows) else "old"
        about = f"The {skill} skill by density", f"The {skill} skill of each candidate. The table has the numbers."
        parts.append(_figure(_by_density(rows, skill), "skill", *about))
    else:
        parts.append("<p>Nothing was evaluated; fapm sweep --evaluate, --tasks or --text does.</p>")
    chosen = (swept["chosen"] or {}).get("name")
    shown = [axis for axis in AXES if any(row.get(axis) for row in rows)]
    head = ["candidate", "kept", "size", *(f"{axis} skill" if axis in ("new", "old") else axis for axis in shown), ""]
    body = []
    for row in rows:
        kept = kept_text(row)
        size = format_bytes(row["written_bytes"]) if row.get("written_bytes") else ""
        note = f"not evaluated: {row['error']}" if row.get("error") else "on the front" if row.get("front") else ""
        if row["name"] == chosen:
            note = "chosen"
        body.append([row["name"], kept, size, *(measure_text(row.get(axis)) for axis in shown), note])
    parts.append(_table(head, body, mark=chosen))
    parts.append(f"<p>{_e(DEFINITIONS)}</p>")
    if chosen:
        alike = swept["chosen"]["alike"]
        told = f" The standard errors do not tell it from {', '.join(alike)}." if alike else ""
        parts.append(f"<p><strong>{_e(out)} is {_e(chosen)}</strong>: {_e(swept['chosen']['why'])}.{_e(told)}</p>")
    return parts


def _of_output(made: dict[str, Any], rows: Sequence[dict[str, Any]], out: str, name: str) -> list[str]:
    parts = [f"<h2>What was done{_e(name)}</h2>", f"<pre>{_e(run_text(run_facts(made, out)))}</pre>"]
    layers, kinds, cells = _by_layer(rows)
    if layers and kinds:
        parts.append(f"<h2>What was kept{_e(name)}</h2>")
        kept = _grid(layers, kinds, cells, "elements"), _grid(layers, kinds, cells, "change")
        told = "; ".join(f"{kind}: {_span(kept[1][:, i])}" for i, kind in enumerate(kinds))
        about = (
            "What was kept, by layer and kind of module",
            "Left the share of the elements that are fine-tuned, right the share of the squared change that they "
            f"carry, from the first layer to the last. Of the squared change were kept in {told}.",
        )
        parts.append(_figure(_heat(layers, kinds, *kept), "kept", *about))
        moved = _moved(layers, cells)
        least, most = np.argmin(moved[:, 0]), np.argmax(moved[:, 0])
        about = (
            "How far each layer has moved",
            f"‖Δ‖ / ‖W‖ of fine-tuning, and of what was kept of it. Fine-tuning moved {layers[most]} most, by "
            f"{moved[most, 0]:.2e}, and {layers[least]} least, by {moved[least, 0]:.2e}.",
        )
        parts.append("<h2>How far each layer has moved</h2>")
        parts.append(_figure(_moves(layers, moved), "moved", *about))
    parts += ["<h2>By kind of tensor</h2>", _kinds_table(rows)]
    paths = {"out": out, **made["paths"]}
    parts += ["<h2>Commands</h2>", f"<pre>{_e(_commands(made, paths))}</pre>"]
    return parts


def _span(values: np.ndarray) -> str:
    known = values[~np.isnan(values)]
    if not known.size:
        return "nothing"
    low, high = float(known.min()), float(known.max())
    return f"{low:.0%}" if f"{low:.0%}" == f"{high:.0%}" else f"{low:.0%} to {high:.0%}"


def _commands(made: dict[str, Any], paths: dict[str, str]) -> str:
    import shlex

    from fapm.recipe import option_words

    sides = ("base", "finetuned", "out")
    words = ["fapm", "prune", *(word for side in sides for word in (f"--{side}", shlex.quote(paths[side])))]
    for field, value in made["recipe"].items():
        if value not in (None, [], False, "checkpoint"):
            words += map(shlex.quote, option_words(field, value))
    return " ".join(words) + f"\nfapm verify {shlex.quote(paths['out'])}"


def _kind_of(name: str, layer: str) -> str:
    inner = name.removeprefix(f"{layer}.") if layer != name else name
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", inner).removesuffix(".weight")


Cells = Mapping[tuple[str, str], list[dict[str, Any]]]


def _by_layer(rows: Iterable[dict[str, Any]]) -> tuple[list[str], list[str], Cells]:
    """The pruned tensors inside layers: the layers in their order, the kinds of modules, and the rows of each cell."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        layer = group_of(row["name"], "layer")
        if layer != row["name"] and row["pruned_numel"]:
            cells.setdefault((layer, _kind_of(row["name"], layer)), []).append(row)
    layers = sorted(
        {layer for layer, _ in cells}, key=lambda name: (name.rpartition(".")[0], int(name.rpartition(".")[2]))
    )
    sizes: dict[str, int] = {}
    for (_, kind), found in cells.items():
        sizes[kind] = sizes.get(kind, 0) + sum(row["pruned_numel"] for row in found)
    kinds = sorted(sizes, key=lambda kind: -sizes[kind])[:_MOST_KINDS]
    return layers, sorted(kinds), cells


_MOST_KINDS = 24


def _grid(layers: Sequence[str], kinds: Sequence[str], cells: Cells, what: str) -> np.ndarray:
    """(layers, kinds) float64: the share of the elements that was kept, or of ‖Δ‖²; NaN where there is none."""
    grid = np.full((len(layers), len(kinds)), np.nan)
    for i, layer in enumerate(layers):
        for j, kind in enumerate(kinds):
            found = cells.get((layer, kind), [])
            if what == "elements":
                whole, part = sum(row["pruned_numel"] for row in found), sum(row["kept"] or 0 for row in found)
            else:
                whole, part = _squares(found)
            if whole:
                grid[i, j] = part / whole
    return grid


def _squares(rows: Iterable[dict[str, Any]]) -> tuple[float, float]:
    """‖Δ‖² of some tensors, and of what was kept."""
    whole = part = 0.0
    for row in rows:
        square = (row["norm_delta"] or 0.0) ** 2
        whole += square
        part += square * (row["kept_share"] or 0.0)
    return whole, part


def _moved(layers: Sequence[str], cells: Cells) -> np.ndarray:
    """(layers, 2): ‖Δ‖ / ‖W‖ of fine-tuning, and of what was kept."""
    found, by_layer = [], dict[str, list[dict[str, Any]]]()
    for (layer, _), listed in cells.items():
        by_layer.setdefault(layer, []).extend(listed)
    for layer in layers:
        rows = by_layer[layer]
        whole, part = _squares(rows)
        weights = math.fsum((row["norm_base"] or 0.0) ** 2 for row in rows)
        found.append([math.sqrt(x / weights) if weights else 0.0 for x in (whole, part)])
    return np.array(found)


def _kinds_table(rows: Iterable[dict[str, Any]]) -> str:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        layer = group_of(row["name"], "layer")
        kinds.setdefault(_kind_of(row["name"], layer), []).append(row)
    body = []
    for kind, found in kinds.items():
        pruned, kept = (sum(row[key] or 0 for row in found) for key in ("pruned_numel", "kept"))
        whole, part = _squares(found)
        weights = math.fsum((row["norm_base"] or 0.0) ** 2 for row in found)
        body.append(
            [
                kind, f"{len(found):,}", f"{sum(row['numel'] for row in found):,}",
                f"{kept / pruned:.1%}" if pruned else "not pruned", f"{part / whole:.1%}" if whole else "–",
                f"{math.sqrt(whole / weights):.2e}" if weights else "–",
            ]
        )  # fmt: skip
    head = ["tensors", "number", "elements", "kept", "kept ‖Δ‖²", "‖Δ‖/‖W‖"]
    return _table(head, body)


def _table(head: Sequence[str], body: Iterable[Sequence[str]], mark: str | None = None) -> str:
    lines = ['<div class="scroll"><table>', "<thead><tr>" + "".join(f'<th scope="col">{_e(c)}</th>' for c in head)]
    lines.append("</tr></thead><tbody>")
    for row in body:
        lines.append(f"<tr{' class=chosen' if mark and row[0] == mark else ''}>")
        lines += [
            f"<td{' class=note' if i == len(row) - 1 and not head[-1] else ''}>{_e(c)}</td>" for i, c in enumerate(row)
        ]
        lines.append("</tr>")
    lines.append("</tbody></table></div>")
    return "".join(lines)


# The figures.


def _figure(drawn: Any, name: str, title: str, told: str) -> str:
    """A figure of matplotlib as SVG inside the page, with its text alternative."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        metadata = {"Date": None, "Creator": None}
        drawn.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = svg.replace("<svg ", f'<svg role="img" aria-labelledby="{name}-title {name}-told" ', 1)
    end = svg.index(">") + 1
    said = f'<title id="{name}-title">{_e(title)}</title><desc id="{name}-told">{_e(told)}</desc>'
    return f"<figure>{svg[:end]}{said}{svg[end:]}<figcaption>{_e(told)}</figcaption></figure>"


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


_BESIDE = ((6, -11), (-20, 6), (6, 6))
_MARKERS, _LINES = "osD^vP", ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))


def _methods(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The candidates of each curve, by rising density."""
    scopes: dict[str, set[str]] = {}
    listed = [row for row in rows if "method" in row]
    for row in listed:
        scopes.setdefault(row["method"], set()).add(row["scope"])
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(listed, key=lambda row: row["density"]):
        several = len(scopes[row["method"]]) > 1
        curves.setdefault(f"{row['method']} ({row['scope']})" if several else row["method"], []).append(row)
    return dict(sorted(curves.items()))


def _trade_off(rows: Sequence[dict[str, Any]], swept: dict[str, Any]) -> Any:
    figure, (axes,) = _axes(8.5, 5.2)

    def place(row: dict[str, Any]) -> tuple[float, float, float, float]:
        x, y = row["retained"], row["forgetting"]
        return 100 * x["value"], 100 * y["value"], 100 * (x["stderr"] or 0), 100 * (y["stderr"] or 0)

    for i, (method, found) in enumerate(_methods(rows).items()):
        x, y, dx, dy = zip(*map(place, found), strict=True)
        axes.errorbar(
            x, y, xerr=dx if any(dx) else None, yerr=dy if any(dy) else None, label=method, color=_SERIES[i % 6],
            marker=_MARKERS[i % 6], linestyle=_LINES[(i + i // 6) % 6], markersize=6, capsize=2, linewidth=1.5,
        )  # fmt: skip
        for row, at_x, at_y in zip(found, x, y, strict=True):
            axes.annotate(
                f"{row['density']:g}", (at_x, at_y), xytext=_BESIDE[i % 3], textcoords="offset points", fontsize=8,
                color=_SERIES[i % 6],
            )  # fmt: skip
    for row in rows:
        if "method" not in row:
            here = place(row)
            axes.errorbar(
                here[:1], here[1:2], xerr=here[2:3], yerr=here[3:], marker="*" if row["name"] == "base" else "X",
                color=_INK, markersize=11, linestyle="none", label=row["name"], capsize=2,
            )  # fmt: skip
        elif row["name"] == (swept["chosen"] or {}).get("name"):
            here = place(row)
            axes.plot(
                here[:1], here[1:2], marker="o", markersize=17, markerfacecolor="none", markeredgecolor=_INK,
                linestyle="none", markeredgewidth=1.5, label="chosen",
            )  # fmt: skip
    axes.set_xlabel("retained: new skill, % of finetuned's (more is better)")
    axes.set_ylabel("forgetting: old skill lost, % of base's (less is better)")
    axes.legend(loc="best", fontsize=9)
    return figure


def _told_trade_off(rows: Sequence[dict[str, Any]], swept: dict[str, Any]) -> tuple[str, str]:
    curves = []
    for method, found in _methods(rows).items():
        ends = [found[0], found[-1]] if len(found) > 1 else found
        curves.append(
            f"{method} "
            + " to ".join(
                f"{row['retained']['value']:.1%} retained and {row['forgetting']['value']:.1%} forgotten at density "
                f"{row['density']:g}"
                for row in ends
            )
        )
    told = (
        "Each candidate by what it retains of the new skill and has forgotten of the old one; a curve is a method over "
        f"its densities, bars are one standard error, right and down is better. {'; '.join(curves)}."
    )
    if swept["chosen"]:
        told += f" Chosen: {swept['chosen']['name']}."
    return "The trade-off between the new skill and the old one", told


def _by_density(rows: Sequence[dict[str, Any]], skill: str) -> Any:
    figure, (axes,) = _axes(8.5, 4.5)
    for i, (method, found) in enumerate(_methods([row for row in rows if row.get(skill)]).items()):
        axes.errorbar(
            [row["density"] for row in found], [row[skill]["value"] for row in found],
            yerr=[row[skill]["stderr"] or 0 for row in found], label=method, color=_SERIES[i % 6],
            marker=_MARKERS[i % 6], linestyle=_LINES[i % 6], capsize=2,
        )  # fmt: skip
    for side, line in (("base", ":"), ("finetuned", "--")):
        row = next(row for row in rows if row["name"] == side)
        if row.get(skill):
            axes.axhline(row[skill]["value"], color=_INK, linestyle=line, linewidth=1, label=side)
    axes.set_xlabel("density")
    axes.set_ylabel(f"{skill} skill")
    axes.legend(loc="best", fontsize=9)
    return figure


def _short(layers: Sequence[str]) -> list[str]:
    """The layers' numbers alone, where there is only one stack."""
    stacks = {name.rpartition(".")[0] for name in layers}
    return [name.rpartition(".")[2] if len(stacks) == 1 else name for name in layers]


def _heat(layers: Sequence[str], kinds: Sequence[str], elements: np.ndarray, change: np.ndarray) -> Any:
    height = min(14.0, 1.6 + 0.3 * len(kinds))
    figure, axes = _axes(10, height, 2)
    shown = _short(layers)
    highest = 10.0 * max(1, math.ceil(10 * np.nanmax(np.stack([elements, change]), initial=0)))
    for number, (one, grid, title) in enumerate(
        zip(axes, (elements, change), ("elements kept, %", "‖Δ‖² kept, %"), strict=True)
    ):
        one.grid(False)
        mesh = one.pcolormesh(
            np.ma.masked_invalid(100 * grid.T),
            cmap="cividis",
            vmin=0,
            vmax=highest,
            edgecolors="none",
            rasterized=False,
        )
        one.set_title(title, fontsize=10)
        step = max(1, len(shown) // 12)
        one.set_xticks(np.arange(0, len(shown), step) + 0.5, shown[::step], rotation=90 if len(shown[0]) > 3 else 0)
        one.set_yticks(np.arange(len(kinds)) + 0.5, kinds if number == 0 else [""] * len(kinds))
        one.invert_yaxis()
        one.set_xlabel("layer")
        if grid.size <= 120:
            for (i, j), value in np.ndenumerate(100 * grid):
                if not np.isnan(value):
                    one.text(i + 0.5, j + 0.5, f"{value:.0f}", ha="center", va="center", fontsize=8,
                             color="#ffffff" if value < 0.55 * highest else "#000000")  # fmt: skip
    figure.colorbar(mesh, ax=list(axes), label="%", shrink=0.9)
    return figure


def _moves(layers: Sequence[str], moved: np.ndarray) -> Any:
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
    return figure
