"""python tests/layouts/make.py: writes pipeline/formats/layouts.json from transformers' conversion tables.

The tables say how the names and tensors of a checkpoint on the Hub become those of a model in memory. They are
facts: patterns, and operations by name. No model's code is in the result, nor run by who uses it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import transformers
from transformers import conversion_mapping

sys.path.insert(0, str(Path(__file__).parents[1]))

from layouts import tiny

TABLE = Path(__file__).parents[2] / "pipeline" / "formats" / "layouts.json"


def said(transform: Any) -> dict[str, Any]:
    """A transform as plain facts."""
    kind = type(transform).__name__
    if kind not in ("WeightRenaming", "PrefixChange", "WeightConverter", "GroupWeightRename"):
        return {"unknown": kind}
    found = {"from": list(transform.source_patterns), "to": list(transform.target_patterns)}
    if kind == "GroupWeightRename":
        found["together"] = True
    for ours, theirs in (("scope", "scope_prefix"), ("prefix", "base_model_prefix")):
        value = getattr(transform, theirs, None)
        if value is not None:
            found[ours] = value
    if kind == "WeightConverter":
        found["how"] = [operation(op) for op in transform.operations]
    return found


def operation(op: Any) -> list[Any]:
    """Its name, and the dimensions that it is about."""
    return [type(op).__name__, {name: value for name, value in vars(op).items() if not name.startswith("_")}]


def table() -> dict[str, Any]:
    lists: list[Any] = []
    by_class: dict[str, int] = {}
    failed: dict[str, str] = {}
    small = {"num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2,
             "decoder_layers": 2, "depth": 2}  # fmt: skip
    for model_type, name in tiny.architectures():
        if not tiny.is_here(name):
            continue
        made = None
        for sizes in (small, None, {}):
            with contextlib.suppress(Exception):
                made = tiny.model(model_type, name, "meta", sizes)
                break
        else:  # what holds for the whole model, without what holds for its parts
            failed[name] = model_type
            made = None
        if made is None:
            listed = conversion_mapping.get_checkpoint_conversion_mapping(name)
            listed = listed or conversion_mapping.get_checkpoint_conversion_mapping(model_type) or []
        else:
            listed = conversion_mapping.get_model_conversion_mapping(made, add_legacy=False)
        found = [said(t) for t in listed]
        if found:
            if found not in lists:
                lists.append(found)
            by_class[name] = lists.index(found)
    legacy = [said(t) for t in conversion_mapping.get_checkpoint_conversion_mapping("legacy")]
    return {
        "made from": f"transformers {transformers.__version__}, src/transformers/conversion_mapping.py (Apache 2.0)",
        "of all": legacy,
        "lists": lists,
        "by class": dict(sorted(by_class.items())),
        "not made": failed,
    }


if __name__ == "__main__":
    made = table()
    TABLE.write_text(json.dumps(made, indent=0, ensure_ascii=False) + "\n")
    print(f"{len(made['by class'])} classes, {len(made['lists'])} lists, {TABLE.stat().st_size} bytes")
    print("not made:", made["not made"])
