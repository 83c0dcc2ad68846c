"""Prune the task vector of a fine-tuned checkpoint (FAPM, arXiv 2509.08255).

    import fapm
    fapm.prune(base="llama/", finetuned="llama-math/", out="pruned/", density=0.1)

`prune`, `merge`, `plan`, `sweep`, `compare`, `verify`, `report`, `status`, `inspect`, `apply` and `extract` do what
the commands of those names do; `Recipe` is what they do it by, `fapm.delta` applies a sparse task vector to a model in
memory. What the user has to mend is a `UserError` with a sentence; where it may pass by itself, a `PassingError`.

What is named here is loaded when it is first used, so that a command line answers before torch is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fapm import delta as delta
    from fapm.api import apply as apply
    from fapm.api import compare as compare
    from fapm.api import extract as extract
    from fapm.api import merge as merge
    from fapm.api import plan as plan
    from fapm.api import prune as prune
    from fapm.api import sweep as sweep
    from fapm.api import verify as verify
    from fapm.errors import PassingError as PassingError
    from fapm.errors import UserError as UserError
    from fapm.planning.plan import Plan as Plan
    from fapm.recipe import Recipe as Recipe
    from fapm.reporting.looking import Facts as Facts
    from fapm.reporting.looking import inspect as inspect
    from fapm.reporting.looking import report as report
    from fapm.reporting.looking import status as status
    from fapm.run import Result as Result
    from fapm.schedule import Watch as Watch

_HOMES = {
    **dict.fromkeys(("apply", "compare", "extract", "merge", "plan", "prune", "sweep", "verify"), "api"),
    **dict.fromkeys(("Facts", "inspect", "report", "status"), "reporting.looking"),
    "PassingError": "errors",
    "Plan": "planning.plan",
    "Recipe": "recipe",
    "Result": "run",
    "UserError": "errors",
    "Watch": "schedule",
}

__all__ = [
    "Facts", "PassingError", "Plan", "Recipe", "Result", "UserError", "Watch", "apply", "compare", "delta", "extract",
    "inspect", "merge", "plan", "prune", "report", "status", "sweep", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "delta":
        return importlib.import_module("fapm.delta")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"fapm.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
