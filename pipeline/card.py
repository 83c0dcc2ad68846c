"""The model card (README.md) of an output: what it is made of and how, for people and for the Hub."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import yaml

from fapm.errors import UserError, one_line
from fapm.formats.checkpoint import Checkpoint, read_config
from fapm.formats.side_files import CARD
from fapm.planning.plan import Plan
from fapm.planning.shards import pattern_of
from fapm.recipe import EVERYTHING, PATHS, Recipe, command_words, how
from fapm.scoring.methods import METHODS
from fapm.storage.address import repository_of, split

if TYPE_CHECKING:
    from huggingface_hub import RepoCard

_CARRIED = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")
_TAGS = ("fapm", "pruned", "task-vector")
_MOST_BYTES = 1 << 20  # of a card that is read
_MOST_ROWS = 60
_REPOSITORY = re.compile(r"[\w][\w.-]{0,95}/[\w.-]{1,96}")


def model_card(plan: Plan, rows: Sequence[dict[str, Any]]) -> str:
    """The card of a run's output. It holds no path of this machine, only the names of folders.

    Args:
        rows: the run's table, one a tensor.
    """
    own, base_s = (_card_of(side) for side in (plan.finetuned, plan.base))
    metadata = _metadata(plan, own, base_s)
    parts = [
        f"---\n{metadata}\n---",
        f"# {_as_text(_title(plan))}",
        _what(plan, rows),
        *([f"## How it was chosen\n\n{plan.chosen}"] if plan.chosen else []),
        "## What was kept\n\n" + _table(rows),
        "## How to make it again\n\n" + _again(plan),
    ]
    if own and own.text.strip():
        whose = f"*Below: the card of {_called(plan.finetuned)}, the fine-tuned model.*"
        parts.append(f"---\n\n{whose}\n\n{own.text.strip()}")
    return "\n\n".join(parts) + "\n"


def _card_of(side: Checkpoint) -> RepoCard | None:
    """A checkpoint's own card, or None if it has none that can be read."""
    try:
        if not side.folder.has(CARD) or side.folder.size(CARD) > _MOST_BYTES:
            return None
        from huggingface_hub import RepoCard  # with it comes all of the library, for a sixth of a second

        return RepoCard(side.folder.read(CARD).decode(), ignore_metadata_errors=True)
    except (UserError, ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError, RecursionError):
        return None


def _metadata(plan: Plan, own: RepoCard | None, base_s: RepoCard | None) -> str:
    of_own, of_base = (_plain(card) for card in (own, base_s))
    found: dict[str, Any] = {name: of_own.get(name) or of_base.get(name) for name in _CARRIED}
    if of_own.get("license"):  # its name and link belong to it
        found |= {name: of_own.get(name) for name in ("license_name", "license_link")}
    parents = [*_repositories(plan.base, _listed(of_own.get("base_model"))), *_repositories(plan.finetuned, [])]
    if parents:
        found["base_model"] = list(dict.fromkeys(parents))
        found["base_model_relation"] = "finetune"
    if read_config(plan.finetuned).get("model_type"):
        found["library_name"] = "transformers"
    found["tags"] = list(dict.fromkeys([*_listed(of_own.get("tags")), *_TAGS]))
    from huggingface_hub.repocard_data import ModelCardData

    return str(ModelCardData(**{name: value for name, value in found.items() if value}).to_yaml()).strip()


def _plain(card: RepoCard | None) -> dict[str, Any]:
    """Of a stranger's metadata the words and the lists of words."""
    if card is None:
        return {}
    return {
        name: value
        for name, value in card.data.to_dict().items()  # type: ignore[no-untyped-call]
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(word, str) for word in value))
    }


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _repositories(side: Checkpoint, otherwise: list[str]) -> list[str]:
    """Name of a checkpoint on the Hub: its address, what is said of it, or what its configuration remembers."""
    named = repository_of(side.folder.address)
    remembered = read_config(side).get("_name_or_path")
    for names in ([named], otherwise, [remembered]):
        found = [name for name in names if isinstance(name, str) and _REPOSITORY.fullmatch(name)]
        if found:
            return found
    return []


def _name(side: Checkpoint) -> str:
    """Its folder's name alone, and nothing else of a path, since a card is for others to read; in one line."""
    return one_line(split(side.folder.absolute().address)[1])


def _title(plan: Plan) -> str:
    if plan.lanes:
        return f"{' and '.join(_name(lane.finetuned) for lane in plan.lanes)}, merged"
    return f"{_name(plan.finetuned)}, pruned"


def _as_text(name: str) -> str:
    """A name as Markdown that shows it as it is: no HTML, no link, no image."""
    return re.sub(r"([\\`*\[\]()<>!&#|~])", r"\\\1", name)


def _called(side: Checkpoint) -> str:
    named = repository_of(side.folder.address)
    return f"[{named}](https://huggingface.co/{named})" if named else "`{}`".format(_name(side).replace("`", "'"))


def _what(plan: Plan, rows: Sequence[dict[str, Any]]) -> str:
    recipe = plan.recipe
    base, finetuned = _called(plan.base), _called(plan.finetuned)
    if recipe.emit == "delta":
        only = replace(plan, recipe=recipe.model_copy(update={"emit": "checkpoint"}))
        return (
            f"{_what(only, rows)}\n\nNot a whole checkpoint but its sparse task vector: what differs from {base}"
            ". `fapm apply --base BASE --delta THIS --out OUT` puts it together, byte for byte."
        )
    if recipe.emit == "adapter":
        rank = sum(row.get("rank") or 0 for row in rows)
        return (
            f"A LoRA adapter for {base}, made of what {finetuned} has changed in it: of each of {len(rows):,} linear "
            f"layers what `{how(recipe.model_dump())}` keeps, {rank:,} singular values in all. Not a whole checkpoint: "
            "PEFT loads it over base."
        )
    if recipe.rules == EVERYTHING:
        return f"All of {finetuned}."
    if plan.lanes:
        return _what_of_a_merge(plan, rows)
    if METHODS[recipe.method].kind == "matrix":
        rank, full = (sum(row.get(key) or 0 for row in rows) for key in ("rank", "full_rank"))
        return (
            f"{base} with a part of what {finetuned} has changed, matrix by matrix: {rank:,} of {full:,} singular "
            f"values of the change, chosen by `{how(recipe.model_dump())}`. What is no matrix is {finetuned}'s."
        )
    if METHODS[recipe.method].kind == "blend":
        return (
            f"{base} and {finetuned}, mixed: in every element {recipe.density:g} of the change that fine-tuning made."
        )
    numel, kept, changed = (sum(row[key] or 0 for row in rows) for key in ("pruned_numel", "kept", "kept_changed"))
    share = f"{kept / numel:.2%}" if numel else "none"
    scaled = " and scaled up" if recipe.method == "dare" else ""
    weights = plan.weights
    alone = (
        f" Of all {weights.numel:,} weights {(kept + weights.taken) / weights.numel:.2%} are fine-tuned: "
        f"{weights.unpaired:,} have no partner in base and stay as they are."
        if weights.unpaired
        else ""
    )
    return (
        f"{base} with a part of what {finetuned} has changed: of {numel:,} elements {kept:,} ({share}) are fine-tuned"
        f"{scaled}, {changed:,} of them other than in base; all others are base's. Chosen by `{recipe.method}` in "
        f"`{recipe.scope}` scope, so that the new skill is kept and the old ones are not forgotten "
        f"([arXiv 2509.08255](https://arxiv.org/abs/2509.08255)).{alone}"
    )


def _what_of_a_merge(plan: Plan, rows: Sequence[dict[str, Any]]) -> str:
    base = _called(plan.base)
    names = [_called(lane.finetuned) for lane in plan.lanes]
    numel, changed = (sum(row[key] or 0 for row in rows) for key in ("pruned_numel", "kept"))
    kept = "; ".join(f"of {name} {how(lane.recipe.model_dump())}" for name, lane in zip(names, plan.lanes, strict=True))
    return (
        f"{base} with a part of what {', '.join(names)} have changed, put together by `{plan.recipe.combine}`: "
        f"{changed:,} of {numel:,} elements are other than in base. What was kept of each: {kept}."
    )


def _table(rows: Iterable[dict[str, Any]]) -> str:
    """Tensors whose names differ in numbers only, in one line."""
    by_pattern: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_pattern.setdefault(pattern_of(row["name"]), []).append(row)
    lines = ["| tensors | number | elements | kept | kept share of ‖Δ‖² |", "| --- | ---: | ---: | ---: | ---: |"]
    for pattern, found in list(by_pattern.items())[:_MOST_ROWS]:
        numel, kept = (sum(row[key] or 0 for row in found) for key in ("pruned_numel", "kept"))
        told = [row for row in found if row["kept_share"] is not None and row["norm_delta"] is not None]
        squares = [(row["norm_delta"] ** 2, row["kept_share"]) for row in told]
        total = sum(square for square, _ in squares)
        share = f"{sum(square * part for square, part in squares) / total:.1%}" if total else "–"
        name = pattern.replace("|", "\\|").replace("`", "'")
        cells = [f"`{name}`", f"{len(found):,}", f"{sum(row['numel'] for row in found):,}"]
        lines.append(f"| {' | '.join([*cells, f'{kept / numel:.1%}' if numel else 'not pruned', share])} |")
    if len(by_pattern) > _MOST_ROWS:
        lines.append(f"| … {len(by_pattern) - _MOST_ROWS:,} more in `fapm/tensors.parquet` | | | | |")
    return "\n".join(lines)


def _again(plan: Plan) -> str:
    base, *finetuned = (repository_of(s.folder.address, pinned=True) or _name(s) for s in plan.inputs.values())
    said = {*plan.recipe.decides(), *PATHS}
    usual = {name: field.default for name, field in Recipe.model_fields.items() if name not in said}
    given = plan.recipe.at(base, finetuned).model_copy(update=usual | {"out": "OUT"})
    words = ["fapm", *command_words(given)]
    line = one_line(shlex.join(words)).replace("`", "'")
    return (
        f"```sh\n{line}\n```\n\nWhat identifies the inputs, and checksums of the output, are in "
        "`fapm/manifest.json`; `fapm verify` reads it all again."
    )
