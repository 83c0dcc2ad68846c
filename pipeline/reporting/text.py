"""Facts laid out for a terminal: short tables, a name and its value a line."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from fapm.choosing.skills import AXES, DEFINITIONS
from fapm.errors import duration, one_line, plural
from fapm.recipe import EVERYTHING, format_bytes, how, parse_rule
from fapm.reporting.advice import advice_text
from fapm.reporting.facts import named
from fapm.reporting.sources import sources_table
from fapm.scoring.methods import METHODS
from fapm.storage.address import scheme_of


def layout(rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows of cells in aligned columns, two blanks between them; the columns in `right` are flush right."""
    cells = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]

    def line(row: list[str]) -> str:
        padded = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, cells))


def fields_text(fields: Iterable[tuple[str, str]]) -> str:
    """A line a field: its name and its value."""
    return layout([("", *field) for field in fields])


def _with_warnings(heading: str, fields: list[tuple[str, str]], warnings: Sequence[str]) -> str:
    """A heading, the fields, and the warnings, a line each."""
    said = [("warnings" if i == 0 else "", warning) for i, warning in enumerate(warnings)] or [("warnings", "none")]
    return f"{heading}\n{fields_text([*fields, *said])}"


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.3%}" if share < 0.1 else f"{share:.1%}"


def run_text(facts: dict[str, Any]) -> str:
    """The table at the end of a prune, from `prune_facts` or `run_facts`."""
    totals, kind = facts["totals"], METHODS[facts["method"]].kind
    heading = f"{facts['out']}: {how(facts)}"
    if tuple(facts["rules"]) == EVERYTHING:
        heading = f"{facts['out']}: all of {facts['finetuned']}"
    if facts.get("nothing_to_do"):
        heading += f"\nalready finished {facts['finished']}; nothing to do"
    elif facts.get("resumed"):
        heading += f"\nwent on from {facts['resumed']} of {plural(facts['shards'], 'shard')} that were finished"
    tensors = f"{totals['tensors']:,}, {totals['pruned_tensors']:,} of them pruned"
    fields = [("tensors", f"{tensors}, in {plural(facts['shards'], 'shard')}"), *_accounts(facts["accounts"])]
    same = "Δ is 0 everywhere: finetuned equals base"
    kept_share = same if totals["kept_share"] is None else _share(totals["kept_share"])
    if kind == "blend":
        fields.append(("α", f"{facts['density']:g} of Δ in every element"))
    elif kind == "matrix":
        fields.append(("rank", f"{totals.get('rank', 0):,} of {totals.get('full_rank', 0):,} singular values"))
        fields.append(("kept ‖Δ‖²", kept_share))
    elif "sources" in facts:
        fields += _sources(facts)
    elif totals["density"] is not None:
        effective = f"{totals['effective_density']:.4g} effective (kept and changed)"
        asked = f"{facts['density']:g} asked" + (", others by rule" if _with_density(facts["rules"]) else "")
        fields.append(("density", f"{asked}, {totals['density']:.4g} kept, {effective}"))
        fields.append(("kept ‖Δ‖²", kept_share))
    fields += _of_all(totals.get("weights"), totals.get("density_of_all"), totals.get("unpaired"))
    rate = facts.get("read_bytes_per_second")
    fields += [
        ("read", format_bytes(totals["read_bytes"]) + (f", {format_bytes(rate)}/s" if rate else "")),
        ("written", format_bytes(totals["written_bytes"])),
        *([("delta", _delta_text(totals))] if totals.get("delta_bytes") else []),
        ("time", f"{duration(facts['run_seconds'])} with {_workers(facts['workers'], facts['lost_workers'])}"),
    ]
    return _with_warnings(heading, fields, facts["oddities"])


def _sources(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Of a merge what was kept of each source, and where they meet."""
    totals, fields = facts["totals"], []
    for i, source in enumerate(facts["sources"], 1):
        kept = f"{source['kept'] / max(1, source['pruned_numel']):.4g} kept, {_share(source['kept_share'])} of ‖Δ‖²"
        fields.append((f"source {i}", f"{source['path']}: {how(source)}, weight {source['weight']:g}; {kept}"))
    numel, kept = totals["pruned_numel"], totals["kept"]
    if numel:
        shared = f", {totals['shared'] / max(1, kept):.1%} of them by several, {totals['opposed'] / max(1, kept):.1%}"
        fields.append(("changed", f"{kept / numel:.4g} of all elements{shared} in different directions"))
    return fields


def next_text(facts: dict[str, Any], emit: str) -> str:
    """What to do with a finished output."""
    out, base = shlex.quote(facts["out"]), shlex.quote(facts["base"])
    load = f"AutoModelForCausalLM.from_pretrained({facts['out']!r})"
    if emit == "delta":
        load = f"fapm apply --base {base} --delta {out} --out WHOLE"
    elif emit == "adapter":
        load = f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({facts['base']!r}), {facts['out']!r})"
    sides = f"--base {base} --finetuned {shlex.quote(facts['finetuned'])}"
    swept = f"fapm sweep {sides} --out SWEPT --density 0.05,0.1,0.2 --evaluate './score.sh {{checkpoint}}'"
    words = [
        ("load it", load),
        ("check it", f"fapm verify {out}"),
        ("look at it", f"fapm report {out} --html page.html"),
    ]
    return "next\n" + fields_text([*words, *([] if "sources" in facts else [("choose", swept)])])


def _of_all(weights: int | None, density: float | None, unpaired: int | None) -> list[tuple[str, str]]:
    """Share of all weights that is fine-tuned, where some have no partner."""
    if not weights or not unpaired or density is None:
        return []
    said = f"{density:.4g} of {weights:,} are fine-tuned, of which {unpaired:,} have no partner in base"
    return [("all weights", said)]


def _delta_text(totals: dict[str, Any]) -> str:
    bits = 8 * totals["delta_bytes"] / max(1, totals["elements"])
    return f"{format_bytes(totals['delta_bytes'])}, {bits:.2f} bits an element"


def _accounts(sides: dict[str, Any]) -> list[tuple[str, str]]:
    """Fate of each side's stored tensors, unless it is the same for all of them."""
    found = []
    for side, account in sides.items():
        reasons: dict[str, list[str]] = {}
        for name, reason in account["left_out"].items():
            reasons.setdefault(reason, []).append(name)
        parts = [f"{count:,} {what}" for what, count in account["counts"].items()]
        why = "".join(f"; {reason} ({named(names)})" for reason, names in reasons.items())
        if len(parts) > 1:
            found.append((side, f"{sum(account['counts'].values()):,}: {', '.join(parts)}{why}"))
    return found


def _workers(count: int, lost: dict[str, int]) -> str:
    return ", ".join([plural(count, "worker"), *(f"{number} {how}" for how, number in lost.items())])


def _with_density(rules: Iterable[str]) -> bool:
    return any(parse_rule(rule).density is not None for rule in rules)


def extremes_text(facts: dict[str, Any]) -> str:
    """Those tensors, a line each, the highest share first."""
    lowest, highest = facts["lowest"][::-1], facts["highest"]
    if not highest:
        return "no tensor has changed"
    if highest[0]["kept_share"] == (lowest or highest)[-1]["kept_share"]:
        return f"every tensor that has changed keeps {_share(highest[0]['kept_share'])} of its ‖Δ‖²"

    def line(row: dict[str, Any]) -> tuple[str, str, str]:
        change = f"{row['norm_delta'] / row['norm_base']:.2e}" if row["norm_base"] else "–"
        return _share(row["kept_share"]), change, f"{row['name']} {row['shape']}"

    between = facts["changed_tensors"] - len(lowest) - len(highest)
    gap = [("…", "", f"({plural(between, 'tensor')} between)")] if between else []
    heading = ("kept ‖Δ‖²", "‖Δ‖ / ‖W‖", "tensor")
    return layout([heading, *map(line, highest), *gap, *map(line, lowest)], right=(0, 1))


def sources_text(layers: Sequence[dict[str, Any]]) -> str:
    """Of a merge who has changed what, a line a layer."""
    head, body = sources_table(layers)
    return layout([head, *body], right=range(1, len(head)))


def densities_text(found: dict[str, float]) -> str:
    """How many tensors have which density, the commonest first, with some of their names."""
    by_density: dict[float, list[str]] = {}
    for name, density in found.items():
        by_density.setdefault(density, []).append(name)
    most = sorted(by_density.items(), key=lambda item: -len(item[1]))
    return "; ".join(f"{density:g} for {named(names)}" for density, names in most)


_STATES = {
    "new": "",
    "unfinished": "\nan unfinished run of this recipe is there; prune goes on with it",
    "finished": "\nthis run is finished; prune would do nothing",
}


_APART = {
    "grown": "with new rows",
    "ruled": "ruled out",
    "passed_through": "passed through",
    "added": "only in finetuned",
    "left_out": "left out",
}


def plan_text(facts: dict[str, Any]) -> str:
    """A plan as a table."""
    recipe, kind = facts["recipe"], METHODS[facts["recipe"]["method"]].kind
    heading = f"{facts['out']}: {how(recipe)}" + _STATES[facts["state"]]
    fields = [(role, _where_text(where)) for role, where in facts["inputs"].items()]
    fields.append(("tensors", f"{facts['tensors']:,}, {facts['pruned'] + len(facts['grown']):,} of them pruned"))
    fields += [(what, named(facts[key])) for key, what in _APART.items() if facts[key]]
    fields += [(f"of {side}", text) for side, text in _accounts(facts["accounts"])]
    if facts["densities"]:
        fields.append(("densities", densities_text(facts["densities"])))
    left = "" if facts["shards_to_do"] == facts["shards"] else f", {facts['shards_to_do']} of them to do"
    wide = f", {facts['wide_groups']:,} of them over several shards" if facts["wide_groups"] else ""
    twice = f", {format_bytes(facts['read_twice_bytes'])} of it twice"
    fields += [
        ("shards", f"{facts['shards']:,}{left}, the largest {format_bytes(facts['largest_shard_bytes'])}"),
        ("groups", f"{facts['groups']:,}{wide}"),
        ("kept", f"{facts['kept_elements']:,} of {facts['competing_elements']:,} elements"),
        *_of_all(facts["weights"], facts["density_of_all"], facts["unpaired"]),
        ("to read", format_bytes(facts["read_bytes"]) + (twice if facts["read_twice_bytes"] else "")),
        ("to write", _to_write(facts)),
        ("memory", f"{format_bytes(facts['memory_bytes_per_worker'])} a worker, beside the interpreter"),
        ("workers", f"{facts['workers']} here, up to {facts['workers_worth_having']:,} are worth having"),
    ]
    if facts["storage"]:
        fields.append(("GPUs", advice_text(facts["storage"])))
    if kind == "matrix":
        by = plural(facts["workers"], "worker")
        fields.insert(
            -2, ("matrices", f"{facts['matrices']:,}, some {duration(facts['matrix_seconds'])} here with {by}")
        )
    if kind != "selection":
        fields = [field for field in fields if field[0] not in ("groups", "kept")]
    return _with_warnings(heading, fields, facts["oddities"])


def _to_write(facts: dict[str, Any]) -> str:
    emit = facts["recipe"].get("emit", "checkpoint")
    if emit == "adapter":
        return "an adapter" + (", all of it to upload" if facts["upload_bytes"] else "")
    if emit == "delta":
        return "what differs from base" + (", all of it to upload" if facts["upload_bytes"] else "")
    more = " and what differs from base" if emit == "both" else ""
    return format_bytes(facts["write_bytes"]) + more + (", all of it to upload" if facts["upload_bytes"] else "")


def _where_text(where: dict[str, Any]) -> str:
    if not scheme_of(where["address"]):
        return f"{where['address']}, a folder here"
    return f"{where['address']}, {format_bytes(where['download_bytes'])} to download"


def checkpoint_text(facts: dict[str, Any]) -> str:
    """A checkpoint as a table."""
    rows = [("tensor", "dtype", "shape", "tensors", "parameters", "bytes", "files")]
    for entry in [*facts["patterns"], {**facts, "name": "all", "dtype": "", "shape": "", "files": len(facts["files"])}]:
        counts = f"{entry['tensors']:,}", f"{entry['parameters']:,}", format_bytes(entry["bytes"])
        rows.append((entry["name"], entry["dtype"], str(entry["shape"]), *counts, f"{entry['files']:,}"))
    dtypes = [f"{dtype} {_share(sums['bytes'] / max(1, facts['bytes']))}" for dtype, sums in facts["dtypes"].items()]
    fields = [
        ("layers", ", ".join(f"{count} in {stack}" for stack, count in facts["layers"].items()) or "none"),
        ("dtypes", ", ".join(dtypes)),
        ("other files", named(facts["side_files"]) if facts["side_files"] else "none"),
    ]
    return layout(rows, right=(3, 4, 5, 6)) + "\n" + _with_warnings("", fields, facts["oddities"])


def measure_text(measure: dict[str, Any] | None) -> str:
    """`0.8123 ±0.0040`, of small numbers as many digits."""
    if measure is None:
        return "–"
    value, stderr = measure["value"], measure["stderr"]
    places = 4 if abs(value) >= 0.1 or value == 0 else min(8, 3 - math.floor(math.log10(abs(value))))
    shown = f"{value:.{places}f}" + (f" ±{stderr:.{places}f}" if stderr is not None else "")
    loss = measure.get("loss")
    return shown if loss is None else f"{shown} ({loss:.3f} nats a token, perplexity {_perplexity(loss)})"


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.4g}" if loss < 700 else "∞"


def _compared(heading: str, facts: Iterable[dict[str, Any]], notes: dict[str, str]) -> str:
    """Checkpoints in rows: what was kept, and what was measured."""
    listed = list(facts)
    shown = [axis for axis in AXES if any(one.get(axis) for one in listed)]
    rows = [(heading, "kept", "size", *shown, "")]
    for one in listed:
        kept = kept_text(one)
        size = format_bytes(one["written_bytes"]) if one.get("written_bytes") else ""
        note = f"not evaluated: {one['error']}" if one.get("error") else notes.get(one["name"], "")
        rows.append((one["name"], kept, size, *(measure_text(one.get(axis)) for axis in shown), note))
    return layout(rows, right=range(1, 3 + len(shown)))


def kept_text(facts: dict[str, Any]) -> str:
    """Density of a candidate, or its share of Δ where its method mixes."""
    if not facts.get("pruned_numel"):
        return ""
    method = METHODS[facts["method"]]
    if method.kind != "selection":
        return f"{method.symbol} {facts.get(method.parameter, 1.0):g}"
    return _share(facts["kept"] / facts["pruned_numel"])


def sides_of(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Base and the fine-tuned checkpoints of a sweep, as its facts have them, with their names."""
    sources = facts.get("sources", [])
    others = [{"name": f"finetuned, {source['path']}", **source} for source in sources]
    name = f"finetuned, {facts['finetuned']['path']}" if others else "finetuned"
    return [{"name": "base", **facts["base"]}, {**facts["finetuned"], "name": name}, *others]


def sweep_text(facts: dict[str, Any], out: str) -> str:
    """A sweep as a table, from `choosing.sweep.sweep_facts`."""
    evaluated = [side for side in sides_of(facts) if "error" in side]
    chosen = facts["chosen"]
    notes = {one["name"]: "on the front" for one in facts["candidates"] if one["front"]}
    if chosen:
        notes |= dict.fromkeys(chosen["alike"], "not told from the chosen one")
        notes |= {chosen["name"]: "chosen"}
    text = _compared("candidate", [*evaluated, *facts["candidates"]], notes)
    if evaluated:
        text += f"\n\n{DEFINITIONS}"
    return text + (f"\n\n{out} is {chosen['name']}: {chosen['why']}" if chosen else "")


def compare_text(facts: dict[str, Any]) -> str:
    """Compared checkpoints as a table, from `choosing.compare.Compared`."""
    found = facts["checkpoints"]
    text = _compared("checkpoint", found, {})
    return text + (f"\n\n{DEFINITIONS}" if any(one["retained"] or one["forgetting"] for one in found) else "")
