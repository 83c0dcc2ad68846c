"""The candidates of a sweep: a recipe of which some choices are lists, as many recipes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fapm.errors import UserError
from fapm.recipe import OF_A_SOURCE, Recipe
from fapm.scoring.methods import METHODS, PARAMETERS
from fapm.storage.address import inside

SWEPT = ("method", "scope", *PARAMETERS, "layer_scale", "combine", "scaling")
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
    lists = {name: _listed(choices[name]) for name in SWEPT if choices.get(name) is not None}
    lists = {name: lists.get(name) or [Recipe.model_fields[name].default] for name in SWEPT}
    several = {name for name, values in lists.items() if len(set(map(str, values))) > 1}
    found: dict[str, Candidate] = {}
    merges = _merges(choices.get("merged") or ())
    for name in ("combine", "scaling") if merges == [()] else ():
        if lists[name] != [Recipe.model_fields[name].default]:
            raise UserError(f"--{name} is for merges, whose sources are listed in a recipe as `merged`")
    for *values, merged in itertools.product(*(lists[name] for name in SWEPT), merges):
        recipe = Recipe.of(**{**choices, **dict(zip(SWEPT, values, strict=True)), "merged": merged or None})
        if recipe.scope not in METHODS[recipe.method].scopes:
            recipe = recipe.model_copy(update={"scope": "tensor"})
        others = (field for field in PARAMETERS if field != METHODS[recipe.method].parameter)
        recipe = recipe.model_copy(update={field: Recipe.model_fields[field].default for field in others})
        name = _name(recipe, "scope" in several)
        if merged:
            name = _name_of_merge(recipe, several, merges)
        recipe = recipe.model_copy(update={"out": inside(folder, name)})
        found.setdefault(name, Candidate(name, recipe))
        if len(found) > MOST:
            raise UserError(f"these are more than {MOST} candidates; sweep fewer methods, scopes or values at once")
    return list(found.values())


def _name(recipe: Recipe, several_scopes: bool) -> str:
    scope = several_scopes and len(METHODS[recipe.method].scopes) > 1
    value = recipe.parameter
    words = [recipe.method, *([recipe.scope] if scope else []), _exact(value)]
    return "-".join([*words, *_layer_scale(recipe)])


def _layer_scale(recipe: Recipe) -> list[str]:
    scale = recipe.layer_scale
    return ["scale", _exact(scale.first), _exact(scale.last)] if scale else []


def _merges(merged: Sequence[Mapping[str, Any]]) -> list[tuple[dict[str, Any], ...]]:
    """Every way to take one of the values, which may be lists, of each choice of a merge's sources."""
    sources = [
        [
            dict(zip(of, values, strict=True))
            for values in itertools.product(*(_or_list(value) for value in of.values()))
        ]
        for of in map(dict, merged)
    ]
    return list(itertools.product(*sources)) or [()]


def _or_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def alone(choices: Mapping[str, Any]) -> Recipe:
    """The recipe of a sweep's choices without what it may have several of; of a merge with the first of them."""
    one = {name: value for name, value in choices.items() if name not in SWEPT}
    return Recipe.of(**one | {"merged": _merges(choices.get("merged") or ())[0] or None})


def _name_of_merge(recipe: Recipe, several: set[str], merges: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """How it is combined, and what else distinguishes it."""
    words: list[str] = [recipe.combine]
    words += [f"scaling-{_exact(recipe.scaling)}"] if "scaling" in several else []
    words += [recipe.method] if "method" in several else []
    words += [recipe.scope] if "scope" in several else []
    words += [_exact(recipe.parameter)] if recipe.parameter and METHODS[recipe.method].parameter in several else []
    words += _layer_scale(recipe) if "layer_scale" in several else []
    for i, source in enumerate(recipe.merged):
        for field in ("weight", *OF_A_SOURCE):
            if len({str(merge[i].get(field)) for merge in merges}) > 1:
                value = getattr(source, field)
                words.append(f"{field}{i + 1}-{value if isinstance(value, str) else _exact(value)}")
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
