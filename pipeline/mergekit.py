"""Recipes of mergekit, read as choices of a merge: the methods that mean the same here, and by name what does not.

What their keys mean is from mergekit's documentation and from running it (0.1.4); no code of it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fapm.errors import UserError, listed


@dataclass(frozen=True)
class _Meaning:
    """What a `merge_method` is here.

    Attributes:
        choices: what is for all sources.
        normalize: whether weights are divided by their sum where the recipe does not say; None where it cannot say.
        normalized, plain: how the sources are combined with and without that; empty where there is none such here.
        density: whether a source's density means something; else all of it counts.
    """

    choices: Mapping[str, Any]
    normalize: bool | None
    normalized: str
    plain: str
    density: bool = False


_WHOLE = {"density": 1.0}

METHODS = {
    "task_arithmetic": _Meaning(_WHOLE, False, "mean", "sum"),
    "linear": _Meaning(_WHOLE, True, "mean", ""),
    "ties": _Meaning({"method": "magnitude"}, True, "ties", "", density=True),
    "dare_ties": _Meaning({"method": "dare"}, False, "ties", "", density=True),
    "dare_linear": _Meaning({"method": "dare"}, False, "mean", "sum", density=True),
    "model_stock": _Meaning(_WHOLE, None, "model-stock", "model-stock"),
    "slerp": _Meaning(_WHOLE, None, "slerp", "slerp"),
}

_KEYS = {"merge_method", "base_model", "models", "parameters", "dtype", "out_dtype"}
_SHARED = {"normalize", "lambda", "weight", "density", "t", "int8_mask"}
_DTYPES = ("bfloat16", "float16", "float32", "float64")


def is_mergekit(loaded: Mapping[str, Any]) -> bool:
    """Whether a mapping is a recipe of mergekit."""
    return "merge_method" in loaded


def choices_of(loaded: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Choices of a merge that a recipe of mergekit stands for.

    Raises:
        UserError: it asks for what there is not here, or for what means something else.
    """

    def refuse(why: str) -> UserError:
        return UserError(f"{path}: {why}")

    name = loaded["merge_method"]
    if name not in METHODS:
        raise refuse(f"merge_method {name!r} of mergekit is not known here; there are {', '.join(METHODS)}")
    meaning = METHODS[name]
    for key in loaded:
        if key not in _KEYS:
            raise refuse(f"{key!r} of mergekit has no meaning here; leave it out")
    shared = _parameters(loaded.get("parameters"), f"{path}: parameters", _SHARED)
    base = loaded.get("base_model")
    if not isinstance(base, str):
        raise refuse("a merge here is over the checkpoint that all were fine-tuned from; say which it is: base_model")
    models = loaded.get("models")
    if not isinstance(models, list) or not models:
        raise refuse("models is to be a list of checkpoints")
    sources = []
    for entry in models:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("model"), str):
            raise refuse("each of models is a mapping with a model, a path or a name")
        if strange := sorted(entry.keys() - {"model", "parameters"}):
            raise refuse(f"models: {listed(strange)} of mergekit has no meaning here; leave it out")
        if "+" in entry["model"]:
            raise refuse(f"{entry['model']}: give the adapter alone as the model, it is added to base")
        own = _parameters(entry.get("parameters"), f"{path}: {entry['model']}", {"weight", "density"})
        if entry["model"] != base:
            sources.append({"finetuned": entry["model"], **own})
    choices: dict[str, Any] = {"base": base, **meaning.choices}
    if meaning.normalize is None:
        choices["combine"] = meaning.plain
    else:
        normalize = shared.get("normalize", meaning.normalize)
        choices["combine"] = meaning.normalized if normalize else meaning.plain
        if not choices["combine"]:
            raise refuse(
                f"merge_method {name} without normalize has no meaning here: what is put together is divided by "
                "the sum of its weights; add normalize: true"
            )
    if name == "slerp":
        if len(sources) != 1:
            raise refuse(f"slerp goes from base_model to one other model, and there are {len(sources)}")
        sources[0]["weight"] = shared.get("t")
        if sources[0]["weight"] is None:
            raise refuse("slerp needs the parameter t")
    for source in sources:
        for key in ("weight", "density"):
            if key in shared and key not in source:
                source[key] = shared[key]
        if not meaning.density:
            source.pop("density", None)
        elif "density" not in source:
            source["density"] = 1.0
        if name == "model_stock":
            source.pop("weight", None)
    if "lambda" in shared and shared["lambda"] != 1:
        choices["scaling"] = shared["lambda"]
    dtype = loaded.get("out_dtype") or loaded.get("dtype")
    if dtype is not None:
        if dtype not in _DTYPES:
            raise refuse(f"dtype {dtype!r}: choose {', '.join(_DTYPES)}")
        choices["dtype"] = dtype
    return {**choices, "merged": sources}


def _parameters(given: Any, where: str, known: set[str]) -> dict[str, Any]:
    """Parameters as single numbers.

    Raises:
        UserError: one has no meaning here, or differs from layer to layer or by a filter.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: parameters is a mapping")
    for name, value in given.items():
        if name not in known:
            raise UserError(f"{where}: the parameter {name!r} of mergekit has no meaning here; leave it out")
        if isinstance(value, list | Mapping):
            raise UserError(
                f"{where}: {name} is a gradient or has a filter; here a source has one {name} for all of its tensors "
                "(--rule gives tensors a density, --layer-scale layers a factor)"
            )
    return {name: value for name, value in given.items() if name != "int8_mask"}
