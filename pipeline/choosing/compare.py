"""Finished checkpoints side by side: what was kept in each, and the same evaluations of all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fapm.choosing.evaluation import Evaluate, Evaluation, Said, evaluate_all, in_turn, skills_of
from fapm.choosing.skills import point_facts, points
from fapm.choosing.sources import BASE, FINETUNED, Source, output
from fapm.errors import UserError
from fapm.layout import MANIFEST
from fapm.manifest.read import load_manifest
from fapm.recipe import Recipe
from fapm.scoring.methods import PARAMETERS
from fapm.storage.address import absolute, input_address, open_store


@dataclass(frozen=True)
class Compared:
    """Checkpoints by name, with the manifests of those that are outputs of fapm, and what was said of them."""

    manifests: dict[str, dict[str, Any] | None]
    said: dict[str, Said]

    def facts(self) -> dict[str, Any]:
        found = points(skills_of(self.said.values()), BASE, FINETUNED)
        rows = []
        for name in dict.fromkeys([*self.said, *self.manifests]):
            made = self.manifests.get(name)
            row: dict[str, Any] = {"name": name, "error": self.said[name].error if name in self.said else ""}
            if made:
                row |= {key: made["recipe"][key] for key in ("method", "scope", *PARAMETERS) if key in made["recipe"]}
                row |= {key: made["totals"][key] for key in ("kept", "pruned_numel", "kept_share", "written_bytes")}
            rows.append(row | point_facts(found.get(name)))
        return {"checkpoints": rows}


def compare(
    paths: Sequence[str],
    asked: Evaluation,
    base: str | None = None,
    finetuned: str | None = None,
    do: Evaluate = in_turn,
    say: Callable[[str], None] = lambda line: None,
) -> Compared:
    """Compare checkpoints.

    Args:
        base, finetuned: where they are not the ones that the outputs of fapm among `paths` were made from, or there are
            none; without them nothing can be said of what was retained and forgotten.

    Raises:
        UserError: a checkpoint cannot be read, or their inputs are not the same.
    """
    manifests: dict[str, dict[str, Any] | None] = {}
    sources: list[Source] = []
    for path in paths:
        address = input_address(path)
        store = open_store(address)
        if not store.exists():
            raise UserError(f"there is no folder {path}")
        if path in manifests:
            raise UserError(f"{path} is given twice")
        manifests[path] = load_manifest(address) if store.has(MANIFEST) else None
        sources.append(_source(path, absolute(address), manifests[path]))
    if asked.is_none:
        return Compared(manifests, {})
    sides = {BASE: base or _common(manifests, BASE), FINETUNED: finetuned or _common(manifests, FINETUNED)}
    first = [Source(name, absolute(input_address(path)), path) for name, path in sides.items() if path]
    with tempfile.TemporaryDirectory(prefix="fapm-") as folder:
        return Compared(manifests, evaluate_all(asked, [*first, *sources], open_store(folder), do, say))


def _source(name: str, address: str, made: dict[str, Any] | None) -> Source:
    if made is None:
        return Source(name, address, address)
    given = {key: made["paths"][key] for key in ("base", "finetuned")} | {"out": address}
    return output(name, address, made, Recipe.of(**{**made["recipe"], **given}))


def _common(manifests: dict[str, dict[str, Any] | None], side: str) -> str | None:
    """The input that all outputs of fapm have in common.

    Raises:
        UserError: they were made from several.
    """
    found = {made["paths"][side] for made in manifests.values() if made}
    if len(found) > 1:
        raise UserError(f"these checkpoints were made from several: {', '.join(sorted(found))}; give --{side}")
    return found.pop() if found else None
