"""An output as one HTML file to look at, that needs no network: first what has come of it, then the trade-off of a
sweep, tables of the same, what was kept where, and how to do it again.

The page is a template of Jinja's, which escapes all that comes from a checkpoint; `figures` draws what is in it.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fapm.choosing.skills import AXES, DEFINITIONS, Measure, Point, doubts, remarks
from fapm.choosing.sweep import read_sweep
from fapm.errors import UserError
from fapm.layout import MANIFEST, SWEEP
from fapm.manifest.read import load_manifest, read_table, recipe_of
from fapm.planning.shards import group_of, pattern_of
from fapm.recipe import command_words, format_bytes, how
from fapm.reporting import figures
from fapm.reporting.facts import run_facts
from fapm.reporting.figures import Figure
from fapm.reporting.sources import shares_by_layer, sources_table
from fapm.reporting.text import kept_text, measure_text, run_text, sides_of
from fapm.storage.address import inside, open_store, split
from fapm.storage.local import plain_errors


@dataclass(frozen=True)
class Table:
    """Rows of cells below a head; `mark` is the first cell of the row that stands out."""

    head: list[str]
    body: list[list[str]]
    mark: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page: a title, and what of the rest there is, in this order."""

    title: str
    lines: list[str] = field(default_factory=list)
    figure: Figure | None = None
    table: Table | None = None
    text: str = ""


def page(out: str) -> str:
    """The page of a finished output, of a sweep, or of both.

    Raises:
        UserError: the folder holds neither, or a library is missing.
    """
    with figures.drawing():
        folder = inside(out, SWEEP)
        swept = read_sweep(folder)
        has_output = open_store(out).has(MANIFEST)
        about, name = out, ""
        if not has_output and swept:
            first = swept["candidates"][0]["name"]
            about, name = inside(folder, first), f" in {first}, the first candidate"
        made = load_manifest(about)  # or says what is there instead
        sections = _of_sweep(swept) if swept else []
        sections += _of_output(made, read_table(about), about, name)
        sections.append(Section("How to do it again", text=_again(made, about, swept)))
        verdict, unsure = _verdict(swept, out) if swept else ([_kept_line(made)], [])
        tuned, base = (split(made["paths"][side])[1] for side in ("finetuned", "base"))
        when = f"{out}, finished {made['finished']} with fapm {made.get('fapm', '')}".rstrip()
        title = f"{tuned} pruned against {base}"
        if made.get("sources"):
            title = f"{' and '.join(split(source['path'])[1] for source in made['sources'])} merged over {base}"
        return _rendered(title, when, verdict, unsure, sections)


def compared_page(facts: dict[str, Any]) -> str:
    """The page of several finished checkpoints, from `choosing.compare.Compared.facts`.

    Raises:
        UserError: a library is missing.
    """
    rows = facts["checkpoints"]
    with figures.drawing():
        section = Section("Side by side", *_evaluated(rows, "", ""), table=_rows_table(rows, ""))
        sections = [section, Section("What the words mean", [DEFINITIONS])]
        names = ", ".join(row["name"] for row in rows if row["name"] not in ("base", "finetuned"))
        return _rendered("Checkpoints side by side", names, [], [], sections)


def write_page(text: str, file: Path) -> int:
    """Write a page through no link, so that it is there as a whole or not at all; returns its bytes.

    Raises:
        UserError: the file cannot be written.
    """
    written = text.encode()
    with plain_errors(file):
        before = file.with_name(f".{file.name}.{os.getpid()}")
        with open(before, "xb") as made:
            made.write(written)
        before.replace(file)
    return len(written)


def _rendered(title: str, when: str, verdict: list[str], unsure: list[str], sections: list[Section]) -> str:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise UserError("--html needs jinja2: pip install 'fapm[page]'") from None
    templates = Environment(
        loader=PackageLoader("fapm.reporting", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    style = Path(__file__).with_name("page.css").read_text()
    return templates.get_template("page.html.j2").render(
        title=title, when=when, verdict=verdict, doubts=unsure, sections=sections, style=style
    )


# What has come of it.


def _kept_line(made: dict[str, Any]) -> str:
    """What a prune has kept, in a sentence."""
    totals = made["totals"]
    share = f", which carry {totals['kept_share']:.1%} of ‖Δ‖²" if totals["kept_share"] is not None else ""
    if totals.get("full_rank"):
        return f"{totals['rank']:,} of {totals['full_rank']:,} singular values of the change are kept{share}."
    if made.get("sources") and totals["pruned_numel"]:
        share, several = totals["kept"] / totals["pruned_numel"], totals["shared"] / max(1, totals["kept"])
        return (
            f"{share:.1%} of the elements are other than in base, {several:.1%} of them changed by several of the "
            f"sources ({how(made['recipe'])}); all others are base's."
        )
    if totals["density"] is None:
        return f"Nothing was pruned in {totals['tensors']:,} tensors."
    return (
        f"{totals['density']:.1%} of the elements are fine-tuned{share}; all others are base's ({how(made['recipe'])})."
    )


def _verdict(swept: dict[str, Any], out: str) -> tuple[list[str], list[str]]:
    """What a sweep has come to, and what speaks against it."""
    found = {name: _point(name, swept[name]) for name in ("base", "finetuned")}
    candidates = {row["name"]: _point(row["name"], row) for row in swept["candidates"]}
    unsure = doubts(found["base"], found["finetuned"])
    unsure += [line for point in candidates.values() for line in remarks(point)]
    chosen = swept["chosen"]
    if chosen:
        point = candidates.get(chosen["name"])
        lines = [f"{out} is {chosen['name']}: {chosen['why']}."]
        if point and point.retained and point.forgetting:
            lost = found["finetuned"].forgetting
            whole = f", where finetuned forgets {_percent(lost)}" if lost else ""
            said = f"It retains {_percent(point.retained)} of the new skill"
            lines.append(f"{said} and forgets {_percent(point.forgetting)} of the old{whole}.")
        if chosen["alike"]:
            lines.append(f"The standard errors do not tell it from {', '.join(chosen['alike'])}.")
        return lines, unsure
    best = [row["name"] for row in swept["candidates"] if row["front"]]
    if best:
        return [f"Nothing was chosen yet. On the front: {', '.join(best)}."], unsure
    return ["Nothing was evaluated; fapm sweep --evaluate, --tasks or --text does."], unsure


def _point(name: str, row: Mapping[str, Any]) -> Point:
    return Point(name, *(Measure(**row[axis]) if row.get(axis) else None for axis in AXES))


def _percent(measure: Measure | Mapping[str, Any] | None) -> str:
    """`93.3 % ±1.1`."""
    if measure is None:
        return "–"
    value, stderr = (
        (measure.value, measure.stderr) if isinstance(measure, Measure) else (measure["value"], measure["stderr"])
    )
    return f"{100 * value:.1f} %" + (f" ±{100 * stderr:.1f}" if stderr is not None else "")


# The parts.


def _of_sweep(swept: dict[str, Any]) -> list[Section]:
    sides = sides_of(swept)
    rows = [sides[0], {**sides[1], "name": "finetuned"}, *swept["candidates"]]
    chosen = (swept["chosen"] or {}).get("name", "")
    how = (swept["chosen"] or {}).get("how", "")
    table = _rows_table([*sides, *swept["candidates"]], chosen)
    return [
        Section("The trade-off", *_evaluated(rows, chosen, how), table=table),
        Section("What the words mean", [DEFINITIONS]),
    ]


def _evaluated(rows: Sequence[dict[str, Any]], chosen: str, rule: str) -> tuple[list[str], Figure | None]:
    """The figure of what was evaluated, if there is any to see."""
    both = [row for row in rows if row.get("retained") and row.get("forgetting")]
    if any(row["name"] not in ("base", "finetuned") for row in both):
        return [], figures.trade_off(both, chosen, rule)
    for skill in ("new", "old"):
        if any(row.get(skill) and "method" in row for row in rows):
            return [], figures.by_parameter(rows, skill)
    return [], None


def _rows_table(rows: Sequence[dict[str, Any]], chosen: str) -> Table:
    """Checkpoints in rows, in the units of the figure."""
    shown = [axis for axis in AXES if any(row.get(axis) for row in rows)]
    head = ["checkpoint", "kept", "size", *(f"{axis} skill" if axis in ("new", "old") else axis for axis in shown), ""]
    body = []
    for row in rows:
        size = format_bytes(row["written_bytes"]) if row.get("written_bytes") else ""
        note = f"not evaluated: {row['error']}" if row.get("error") else "on the front" if row.get("front") else ""
        note = "chosen" if row["name"] == chosen else note
        cells = [measure_text(row.get(a)) if a in ("new", "old") else _percent(row.get(a)) for a in shown]
        body.append([row["name"], kept_text(row), size, *cells, note])
    return Table(head, body, chosen)


def _of_output(made: dict[str, Any], rows: Sequence[dict[str, Any]], out: str, name: str) -> list[Section]:
    sections = [Section(f"What was done{name}", text=run_text(run_facts(made, out)))]
    if made.get("sources"):
        of_sources = [read_table(out, i) for i, _ in enumerate(made["sources"], 1)]
        return [
            *sections,
            Section("Who has changed what", table=Table(*sources_table(shares_by_layer(rows, of_sources)))),
        ]
    layers, kinds, cells = _by_layer(rows)
    if layers and kinds:
        grids = {
            what: _grid(layers, kinds, cells, what) for what in ("elements kept", "changed elements kept", "‖Δ‖² kept")
        }
        drawn = figures.kept(layers, kinds, grids)
        if drawn:
            sections.append(Section(f"What was kept{name}", figure=drawn))
        sections.append(Section("How far each layer has moved", figure=figures.moves(layers, _moved(layers, cells))))
    sections.append(Section("By kind of tensor", table=_kinds_table(rows)))
    return sections


def _again(made: dict[str, Any], out: str, swept: dict[str, Any] | None) -> str:
    """The commands: the sweep's, the prune's, and what checks it."""
    paths = made["paths"]
    finetuned = [source["path"] for source in made.get("sources", ())] or [paths["finetuned"]]
    words = ["fapm", *command_words(recipe_of(made, paths["base"], finetuned, out))]
    lines = [shlex.join(swept["command"])] if swept and swept.get("command") else []
    return "\n".join([*lines, shlex.join(words), f"fapm verify {shlex.quote(out)}"])


def _kind_of(name: str, layer: str) -> str:
    inner = name.removeprefix(f"{layer}.") if layer != name else name
    return pattern_of(inner).removesuffix(".weight")


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
    """(layers, kinds) float64: the share that was kept of the elements, of those that changed, or of ‖Δ‖²; NaN where
    there is none."""
    grid = np.full((len(layers), len(kinds)), np.nan)
    for i, layer in enumerate(layers):
        for j, kind in enumerate(kinds):
            found = cells.get((layer, kind), [])
            if what == "elements kept":
                whole, part = sum(row["pruned_numel"] for row in found), sum(row["kept"] or 0 for row in found)
            elif what == "changed elements kept":
                whole, part = (sum(row[key] or 0 for row in found) for key in ("changed", "kept_changed"))
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


def _kinds_table(rows: Iterable[dict[str, Any]]) -> Table:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        layer = group_of(row["name"], "layer")
        kinds.setdefault(_kind_of(row["name"], layer), []).append(row)
    ranked = any(row.get("full_rank") for found in kinds.values() for row in found)
    body = []
    for kind, found in kinds.items():
        pruned, kept = (sum(row[key] or 0 for row in found) for key in ("pruned_numel", "kept"))
        rank, full = (sum(row.get(key) or 0 for row in found) for key in ("rank", "full_rank"))
        whole, part = _squares(found)
        weights = math.fsum((row["norm_base"] or 0.0) ** 2 for row in found)
        share = f"{rank:,} of {full:,}" if ranked else f"{kept / pruned:.1%}" if pruned else "not pruned"
        cells = [kind, f"{len(found):,}", f"{sum(row['numel'] for row in found):,}", share if pruned else "not pruned"]
        cells += [f"{part / whole:.1%}" if whole else "–", f"{math.sqrt(whole / weights):.2e}" if weights else "–"]
        body.append(cells)
    what = "rank kept" if ranked else "kept"
    return Table(["tensors", "number", "elements", what, "kept ‖Δ‖²", "‖Δ‖/‖W‖"], body)
