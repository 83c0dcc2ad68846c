"""The candidates of a sweep: a recipe of which some choices are lists, as many recipes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fapm.errors import UserError
from fapm.recipe import Recipe
from fapm.scoring.methods import METHODS, PARAMETERS
from fapm.storage.address import inside

SWEPT = ("method", "scope", *PARAMETERS, "layer_scale")
"""The choices that a sweep may have several of."""

MOST = 200
"""Candidates, at most."""


@dataclass(frozen=True)
class Candidate:
    """One way to prune. `name` says what distinguishes it, and is the name of its folder."""

    name: str
    recipe: Recipe


def candidates(choices: dict[str, Any], folder: str) -> list[Candidate]:
    """Every combination of the methods in `choices`, the scopes that each has and the values of its parameter, all of
    which may be lists, or words between commas; in `folder`, each under its name.

    Raises:
        UserError: a choice cannot be, or there are too many.
    """
    if choices.get("merged"):
        raise UserError(
            "a sweep is over ways to prune one fine-tuned checkpoint; give a merge's to fapm merge, one by one"
        )
    lists = {name: _listed(choices[name]) for name in SWEPT if choices.get(name) is not None}
    lists = {name: lists.get(name) or [Recipe.model_fields[name].default] for name in SWEPT}
    found: dict[str, Candidate] = {}
    for values in itertools.product(*(lists[name] for name in SWEPT)):
        recipe = Recipe.of(**{**choices, **dict(zip(SWEPT, values, strict=True))})
        if recipe.scope not in METHODS[recipe.method].scopes:
            recipe = recipe.model_copy(update={"scope": "tensor"})
        others = (field for field in PARAMETERS if field != METHODS[recipe.method].parameter)
        recipe = recipe.model_copy(update={field: Recipe.model_fields[field].default for field in others})
        name = _name(recipe, several_scopes=len(set(lists["scope"])) > 1)
        recipe = recipe.model_copy(update={"out": inside(folder, name)})
        found.setdefault(name, Candidate(name, recipe))
        if len(found) > MOST:
            raise UserError(f"these are more than {MOST} candidates; sweep fewer methods, scopes or values at once")
    return list(found.values())


def _name(recipe: Recipe, several_scopes: bool) -> str:
    scope = several_scopes and len(METHODS[recipe.method].scopes) > 1
    value = recipe.parameter
    words = [recipe.method, *([recipe.scope] if scope else []), _exact(value)]
    if recipe.layer_scale:
        words += ["scale", *map(_exact, (recipe.layer_scale.first, recipe.layer_scale.last))]
    return "-".join(words)


def _exact(value: float) -> str:
    """A number in as few digits as tell it from others."""
    return next(text for text in (f"{value:g}", f"{value:.17g}") if float(text) == value)


def _listed(value: Any) -> list[Any]:
    """`0.1,0.2`, a list of such, or a single value → values."""
    if isinstance(value, str):
        return [word.strip() for word in value.split(",") if word.strip()]
    if isinstance(value, Iterable):
        return [one for part in value for one in _listed(part)]
    return [value]
