"""Prune the task vector of a fine-tuned checkpoint (FAPM, arXiv 2509.08255).

    from fapm import Recipe, prune
    prune(Recipe(base="base/", finetuned="finetuned/", out="pruned/"))

What is named here is loaded when it is first used, so that a command line answers before torch is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fapm.errors import UserError as UserError
    from fapm.planning.make import make_plan as make_plan
    from fapm.publish import prune as prune
    from fapm.recipe import Recipe as Recipe

_HOMES = {"Recipe": "recipe", "UserError": "errors", "make_plan": "planning.make", "prune": "publish"}

__all__ = ["Recipe", "UserError", "make_plan", "prune"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"fapm.{_HOMES[name]}"), name)
