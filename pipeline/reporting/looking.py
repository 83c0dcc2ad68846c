"""Looking at what is there: a checkpoint, a finished prune or sweep, a run at work.

Each loads what it needs and no more: a header is read without a library that computes.
"""

from __future__ import annotations

import html
from typing import Any

from fapm.formats.checkpoint import open_checkpoint
from fapm.formats.newest import newest
from fapm.layout import MANIFEST, SWEEP
from fapm.reporting.facts import checkpoint_facts, densities, extremes, run_facts
from fapm.reporting.sources import shares_by_layer
from fapm.reporting.text import checkpoint_text, densities_text, extremes_text, run_text, sources_text, sweep_text
from fapm.storage.address import inside, open_store


class Facts(dict[str, Any]):
    """Facts as `--json` prints them, shown as the command line shows them."""

    def __init__(self, facts: dict[str, Any], text: str):
        super().__init__(facts)
        self._text = text

    def __repr__(self) -> str:
        return self._text

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self._text)}</pre>"


def report(out: str) -> Facts:
    """What a finished prune or sweep has done, and which tensors kept least and most of Δ.

    Raises:
        UserError: there is none.
    """
    from fapm.choosing.sweep import read_sweep
    from fapm.manifest.read import load_manifest, read_table

    swept = read_sweep(inside(out, SWEEP))
    facts: dict[str, Any] = {"sweep": swept} if swept else {}
    texts = [sweep_text(swept, out)] if swept else []
    if not swept or open_store(out).has(MANIFEST):
        facts |= run_facts(load_manifest(out), out)
        rows = read_table(out)
        found = densities((row["name"], row["density"]) for row in rows if row["density"] is not None)
        if "sources" in facts:
            of_sources = [read_table(out, i) for i, _ in enumerate(facts["sources"], 1)]
            layers = shares_by_layer(rows, of_sources)
            facts |= {"layers": layers, "densities": found}
            texts += [run_text(facts), sources_text(layers)]
        else:
            facts |= extremes(rows) | {"densities": found}
            texts += [run_text(facts), extremes_text(facts)]
        texts += [f"densities: {densities_text(found)}"] if found else []
    return Facts(facts, "\n\n".join(texts))


def status(out: str) -> Facts:
    """How far a run is, while it is at work and after it has ended or died.

    Raises:
        UserError: no run was ever begun there.
    """
    from fapm.reporting.status import status_facts, status_text

    facts = status_facts(out)
    return Facts(facts, status_text(facts))


def inspect(checkpoint: str) -> Facts:
    """What a folder holds, from its headers alone.

    Raises:
        UserError: it holds no checkpoint that can be read.
    """
    path, passed = newest(checkpoint, "checkpoint")
    facts = checkpoint_facts(open_checkpoint(path, "checkpoint"))
    facts["oddities"] = [*passed, *facts["oddities"]]
    return Facts(facts, checkpoint_text(facts))
