"""python tests/layouts/sweep.py [TYPE…]: every architecture in the layouts of the Hub and of transformers' memory.

A tiny model is saved by transformers in both, as base and fine-tuned. Pruned across the layouts the output must be that
of the prune within finetuned's. Prints a line an architecture and counts.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from checkpoints import load  # noqa: E402

from fapm import Recipe, UserError, prune  # noqa: E402
from layouts import tiny  # noqa: E402


def make(folder: Path, model_type: str, name: str) -> bool:
    """base and finetuned in both layouts; returns whether these differ."""
    model = tiny.model(model_type, name)
    for side in ("base", "finetuned"):
        if side == "finetuned":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
        for layout, original in (("hub", True), ("memory", False)):
            model.save_pretrained(folder / f"{side}-{layout}", save_original_format=original)
    return load(folder / "base-hub").keys() != load(folder / "base-memory").keys()


def pruned(folder: Path, base: str, finetuned: str, out: str) -> dict[str, torch.Tensor]:
    sides = {"base": str(folder / f"base-{base}"), "finetuned": str(folder / f"finetuned-{finetuned}")}
    prune(Recipe.of(**sides, out=str(folder / out), density=0.3, device="cpu", workers=1))
    return load(folder / out)


def check(folder: Path, model_type: str, name: str) -> str:
    """What became of one architecture: `same`, `works`, or why not."""
    try:
        differ = make(folder, model_type, name)
    except Exception as error:
        return f"not made: {type(error).__name__} {str(error)[:60]}"
    if not differ:
        return "same"
    for base, finetuned in (("hub", "memory"), ("memory", "hub")):
        wanted = pruned(folder, finetuned, finetuned, f"within-{finetuned}")
        try:
            found = pruned(folder, base, finetuned, f"across-{finetuned}")
        except UserError as error:
            return f"refused: {error}"
        if found.keys() != wanted.keys():
            return "WRONG names"
        wrong = [key for key in wanted if not torch.equal(found[key], wanted[key])]
        if wrong:
            return f"WRONG values of {wrong[0]}"
    return "works"


def main(types: list[str]) -> dict[str, str]:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found: dict[str, str] = {}
    for model_type, name in tiny.architectures():
        if tiny.is_here(name) and (not types or model_type in types):
            with tempfile.TemporaryDirectory() as folder:
                found[name] = check(Path(folder), model_type, name)
            print(f"{model_type:28} {name:44} {found[name][:200]}", flush=True)
    return found


if __name__ == "__main__":
    said: Any = Counter(what.partition(":")[0].split(" ")[0] for what in main(sys.argv[1:]).values())
    print(dict(said))
