"""Recipe: everything a user can choose about a prune, validated, from YAML or from keyword arguments."""

from __future__ import annotations

import difflib
import re
import reprlib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from fapm import fields
from fapm.descriptions import DESCRIPTIONS
from fapm.errors import UserError
from fapm.mergekit import choices_of, is_mergekit
from fapm.scoring.methods import METHODS
from fapm.storage.address import absolute

_ALWAYS_SAID = ("method", "density", "scope", "rules", "dtype", "seed", "nonfinite", "shard_size")
"""Choices that every run has recorded, usual ones too."""

EVERYTHING = ("*=finetuned",)
"""The rules that take all of finetuned as it is."""

Action = Literal["prune", "base", "finetuned"]


@dataclass(frozen=True, slots=True)
class Rule:
    """Treatment of the tensors whose name matches `pattern`; `density` is None where it is the recipe's."""

    pattern: str
    action: Action
    density: float | None = None


def parse_rule(text: Any) -> Rule:
    """`GLOB=prune`, `GLOB=base`, `GLOB=finetuned` or `GLOB=0.05` → Rule."""
    pattern, _, action = text.rpartition("=") if isinstance(text, str) else ("", "", "")
    if pattern and action in ("prune", "base", "finetuned"):
        return Rule(pattern, action)  # type: ignore[arg-type]
    shown = text if isinstance(text, str) else reprlib.repr(text)
    action = str(parse_share(action))
    if not pattern or not re.fullmatch(r"\d*\.?\d+(e-?\d+)?", action):
        raise ValueError(f"{shown} is not a rule; write it like '*.bias=base' (or =prune, =finetuned, =0.05)")
    if float(action) > 1:
        raise ValueError(f"{shown}: a density is at least 0 and at most 1")
    return Rule(pattern, "prune", float(action))


@lru_cache
def _parse_rules(rules: tuple[str, ...]) -> tuple[Rule, ...]:
    return tuple(map(parse_rule, rules))


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(value: Any) -> int:
    """`512MB`, `1.5GiB`, `4096` → bytes. Decimal and binary units as they are written."""
    text = str(value).lower() if isinstance(value, str | int | float) else ""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([kmgt]i?|)b?\s*", text)
    if not match:
        raise ValueError(f"{reprlib.repr(value)} is not a size; write it like 512MB or 1GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def format_bytes(n: float) -> str:
    """`1.5 GB`, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.4g} TB"


Bytes = Annotated[int, BeforeValidator(parse_bytes)]


def parse_share(value: Any) -> Any:
    """`10%` → 0.1; anything else as it is."""
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,12})?)\s*%\s*", value) if isinstance(value, str) else None
    return float(Decimal(match[1]) / 100) if match else value


Share = Annotated[float, BeforeValidator(parse_share)]

LEAST_MEMORY, LEAST_DEVICE_MEMORY = 1 << 26, 1 << 28
"""Bytes, of a worker."""

MOST_WORKERS = 100_000


@dataclass(frozen=True, slots=True)
class Workers:
    """How many workers to ask for at most, and how many to wait for before work begins."""

    least: int
    most: int

    def plain(self) -> int | str:
        """As a user would write it."""
        return self.most if self.least == 1 else f"{self.least}-{self.most}"


def parse_workers(value: Any) -> Workers:
    """`4` or `2-8` → Workers."""
    if isinstance(value, Workers):
        return value
    match = re.fullmatch(r"(?:([0-9]{1,6})-)?([0-9]{1,6})", str(value)) if isinstance(value, int | str) else None
    least, most = (int(match[1] or 1), int(match[2])) if match else (0, 0)
    if isinstance(value, bool) or not 1 <= least <= most <= MOST_WORKERS:
        raise ValueError(f"give a number like 4 or a range like 2-8, of 1 to {MOST_WORKERS:,}")
    return Workers(least, most)


@dataclass(frozen=True, slots=True)
class LayerScale:
    """What is kept in the first layer of a stack is multiplied by `first`, in the last by `last`, between them by what
    lies between; outside layers by `first`. LiNeS, arXiv 2410.17146."""

    first: float
    last: float

    def plain(self) -> str:
        """As a user would write it."""
        return f"{self.first!r}:{self.last!r}"

    def of(self, layer: int, layers: int) -> float:
        """The factor of one of a stack of layers, counted from 0."""
        return self.first + (self.last - self.first) * layer / (layers - 1) if layers > 1 else self.first


def parse_layer_scale(value: Any) -> LayerScale:
    """`0.5:1` → LayerScale."""
    if isinstance(value, LayerScale):
        return value
    number = r"-?(?:\d{1,6}(?:\.\d{0,17})?|\.\d{1,17})(?:e-?\d{1,2})?"
    match = re.fullmatch(rf"\s*({number})\s*:\s*({number})\s*", value) if isinstance(value, str) else None
    factors = [float(factor) for factor in match.groups()] if match else []
    if not factors or max(map(abs, factors)) > 1e6:
        raise ValueError("give the factors of the first and of the last layer, like 0.5:1, of at most 1,000,000")
    return LayerScale(*factors)


def _key_and_value(label: str) -> str:
    if not re.fullmatch(r"[^=\s]+=\S+", label):
        raise ValueError("write a label like market-type=spot")
    return label


class Source(BaseModel):
    """One of the fine-tuned checkpoints of a merge; what it does not say is the recipe's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    finetuned: str
    weight: float = Field(1.0, allow_inf_nan=False)
    method: str | None = None
    density: Share | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    scope: Literal["tensor", "layer", "global"] | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)

    @field_validator("method")
    @classmethod
    def _known(cls, method: str | None) -> str | None:
        return method if method is None else known_method(method)

    @field_validator("finetuned")
    @classmethod
    def _an_input(cls, path: str) -> str:
        return fields.check(path, fields.TIMES)


def known_method(method: str) -> str:
    """The method itself.

    Raises:
        ValueError: there is none of that name.
    """
    if method not in METHODS:
        raise ValueError(f"there is no such method; choose one of {', '.join(METHODS)}")
    return method


PATHS = ("base", "finetuned", "out")

ON_RAY_ONLY = ("cpus_per_worker", "gpus_per_worker", "accelerator", "labels")
"""The choices that mean nothing in one process."""


class Recipe(BaseModel):
    """Everything a user can choose: what to prune, how, and with what means.

    Raises:
        UserError: a value that cannot be, with the field's name; a name that there is not, with the nearest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str
    finetuned: str
    out: str
    method: str = "fapm"
    density: Share = Field(0.1, ge=0, le=1, allow_inf_nan=False)
    strength: float = Field(1.0, ge=0, le=1e6, allow_inf_nan=False)
    tail: Share = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    rank: int = Field(16, ge=1, le=2**20)
    scope: Literal["tensor", "layer", "global"] = "tensor"
    layer_scale: Annotated[LayerScale, BeforeValidator(parse_layer_scale), PlainSerializer(LayerScale.plain)] | None = (
        None
    )
    rules: tuple[str, ...] = ()
    renames: tuple[str, ...] = ()
    allow_pickle: bool = False
    allow_code: bool = False
    allow_same: bool = False
    strict: bool = False
    emit: Literal["checkpoint", "delta", "both", "adapter"] = "checkpoint"
    delta_compression: Literal["zstd", "none"] = "zstd"
    reversible: bool = False
    on_conflict: Literal["error", "first", "last"] = "error"
    unpaired: Literal["error", "pass"] = "error"
    plain_codes: bool = False
    dtype: Literal["bfloat16", "float16", "float32", "float64"] | None = None
    seed: int = Field(0, ge=0, lt=2**63)
    nonfinite: Literal["error", "base"] = "error"
    shard_size: Annotated[Bytes, Field(ge=2**10)] | None = None
    memory: Bytes = Field(2**30, ge=LEAST_MEMORY)
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    device_memory: Annotated[Bytes, Field(ge=LEAST_DEVICE_MEMORY)] | None = None
    staging: str | None = Field(None, min_length=1)
    visibility: Literal["private", "public"] = "private"
    alone: bool = False
    merged: tuple[Source, ...] = ()
    combine: Literal["sum", "mean", "ties", "slerp", "model-stock", "first", "last", "error"] = "sum"
    scaling: float = Field(1.0, allow_inf_nan=False)
    workers: Annotated[Workers, BeforeValidator(parse_workers), PlainSerializer(Workers.plain)] | None = None
    cpus_per_worker: int | None = Field(None, ge=1, le=1024)
    gpus_per_worker: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    accelerator: str | None = Field(None, min_length=1)
    labels: tuple[Annotated[str, AfterValidator(_key_and_value)], ...] = ()

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        return known_method(method)

    @field_validator("base", "finetuned")
    @classmethod
    def _an_input(cls, path: str) -> str:
        return fields.check(path, fields.TIMES)

    @field_validator("out")
    @classmethod
    def _an_output(cls, path: str) -> str:
        return fields.check(path, fields.TIMES + fields.CHOICES)

    @field_validator("renames")
    @classmethod
    def _renames(cls, renames: tuple[str, ...]) -> tuple[str, ...]:
        for text in renames:
            before, equals, after = text.partition("=")
            stars = [(part.startswith("*"), part.endswith("*")) for part in (before, after)]
            bare = [part.strip("*") for part in (before, after)]
            inside = stars[0] == (True, True) and not bare[0]
            if not equals or before == after or stars[0] != stars[1] or stars[0] == (False, True) or inside:
                raise ValueError(
                    f"{text!r} is not FROM=TO, the beginnings of base's and finetuned's names (*FROM*=*TO* is the same "
                    "in the middle of names, *FROM=*TO at their ends)"
                )
            if any("*" in part for part in bare):
                raise ValueError(f"{text!r}: a * stands at the beginning or the end")
        return renames

    @field_validator("rules", mode="before")
    @classmethod
    def _well_formed(cls, rules: Any) -> Any:
        if not isinstance(rules, list | tuple):
            raise ValueError(f"{reprlib.repr(rules)} is not a list of rules like '*.bias=base'")
        for rule in rules:
            parse_rule(rule)
        return tuple(rules)

    @model_validator(mode="after")
    def _one_first(self) -> Recipe:
        if self.merged and self.merged[0].finetuned != self.finetuned:
            raise ValueError("of a merge the fine-tuned checkpoints are in `merged`, and the first is another one")
        return self

    def __init__(self, /, **choices: Any) -> None:
        if "finetuned" not in choices and (first := _first_of(choices.get("merged"))):
            choices["finetuned"] = first
        try:
            super().__init__(**choices)
        except ValidationError as error:
            raise UserError("; ".join(_sentence(e, choices) for e in error.errors()[:5])) from None

    @classmethod
    def of(cls, /, **choices: Any) -> Recipe:
        """A recipe from keyword arguments; those that are None keep their default."""
        return cls(**{name: value for name, value in choices.items() if value is not None})

    @classmethod
    def load(cls, path: str | Path, /, **overrides: Any) -> Recipe:
        """A recipe from a YAML file, its fields overridden by the keyword arguments that are not None."""
        return cls.of(**{**read_recipe(path), **{k: v for k, v in overrides.items() if v is not None}})

    def to_yaml(self) -> str:
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        return text

    def decides(self) -> dict[str, Any]:
        """The choices that the output's bytes depend on; the others only say by what means."""
        means = {*PATHS, *ON_RAY_ONLY, "allow_same", "strict", "memory", "device", "device_memory", "staging"}
        means |= {"visibility", "alone", "workers"}
        found = self.model_dump(mode="json", exclude=means)
        found["merged"] = [{k: v for k, v in source.items() if k not in PATHS} for source in found["merged"]]
        # All else is left out where it is not chosen, so that a run begun before it could be chosen can go on.
        usual = {name: field.default for name, field in type(self).model_fields.items() if name not in _ALWAYS_SAID}
        return {k: v for k, v in found.items() if k not in usual or v not in (usual[k], [])}

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Addresses of the inputs: base, and what was fine-tuned from it."""
        return (self.base, *(source.finetuned for source in self.merged or (self,)))

    def at(self, base: str, finetuned: Sequence[str]) -> Recipe:
        """The same with other addresses of the inputs."""
        merged = [
            of.model_copy(update={"finetuned": path})
            for of, path in zip(self.merged, finetuned, strict=bool(self.merged))
        ]
        return self.model_copy(update={"base": base, "finetuned": finetuned[0], "merged": tuple(merged)})

    def with_paths(self, change: Callable[[str], str]) -> Recipe:
        """The same with other addresses of the inputs and the output, each made of the one that it has."""
        base, *finetuned = map(change, self.checkpoints)
        return self.at(base, finetuned).model_copy(update={"out": change(self.out)})

    def literal(self) -> Recipe:
        """The same with absolute paths, of which none has fields any more."""
        return self.with_paths(lambda path: fields.literal(absolute(path)))

    @property
    def lanes(self) -> tuple[Recipe, ...]:
        """Recipes of a merge's sources, each as it would be pruned alone; of a prune itself."""
        if not self.merged:
            return (self,)
        alone: dict[str, Any] = {"merged": (), "combine": "sum", "scaling": 1.0}
        said = ({k: v for k in ("finetuned", *OF_A_SOURCE) if (v := getattr(of, k)) is not None} for of in self.merged)
        return tuple(self.model_copy(update=alone | of) for of in said)

    @property
    def on_device(self) -> bool:
        """Whether a GPU can do what is wanted."""
        return METHODS[self.method].on_device and not self.merged

    @property
    def parameter(self) -> float:
        """The method's: a density, α, a strength, a tail or a rank."""
        return float(getattr(self, METHODS[self.method].parameter))

    @property
    def parsed_rules(self) -> tuple[Rule, ...]:
        return _parse_rules(self.rules)

    def rule_of(self, name: str) -> Rule | None:
        """The first rule that matches a tensor's name."""
        return next((rule for rule in self.parsed_rules if fnmatchcase(name, rule.pattern)), None)

    def action(self, name: str) -> Action | None:
        """Action of the first rule that matches a tensor's name, or None."""
        rule = self.rule_of(name)
        return rule.action if rule else None


OF_A_SOURCE = ("method", "density", "scope", "seed")
"""Choices that each source of a merge may have of its own, and that are the recipe's where it has not."""


def _first_of(merged: Any) -> str | None:
    """The checkpoint that a merge's first source names, if it does."""
    first = merged[0] if isinstance(merged, list | tuple) and merged else None
    found = first.get("finetuned") if isinstance(first, Mapping) else getattr(first, "finetuned", None)
    return found if isinstance(found, str) else None


for _name, _field in Recipe.model_fields.items():
    _field.description = DESCRIPTIONS[_name]
Recipe.__doc__ = f"{Recipe.__doc__}\n    Attributes:\n" + "".join(
    f"        {name}: {text}\n" for name, text in DESCRIPTIONS.items()
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping of plain values; tags that would build objects are refused."""
    try:
        text = Path(path).read_bytes()
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise UserError(f"{path}: a recipe has no YAML references; write out what each stands for")
        loaded = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise UserError(f"{path}{line}: not plain YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: a recipe is a YAML mapping like 'density: 0.1'")
    return {str(key).replace("-", "_"): value for key, value in loaded.items()}


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The choices in a YAML file, and perhaps `ray`; of a recipe of mergekit what it stands for.

    Raises:
        UserError: it is no plain YAML, or names a choice that there is not.
    """
    known = read_yaml(path)
    if is_mergekit(known):
        return choices_of(known, str(path))
    for name in known:
        if name not in (*Recipe.model_fields, "ray"):
            lines = Path(path).read_text(errors="replace").splitlines()
            at = next((i for i, line in enumerate(lines, 1) if _key_in(line) == name), 0)
            raise UserError(f"{path}{f', line {at}' if at else ''}: {_no_such(name)}")
    return known


def _key_in(line: str) -> str:
    """The key with which a line of YAML begins."""
    return line.partition(":")[0].strip("'\"").replace("-", "_")


def _no_such(field: str) -> str:
    near = difflib.get_close_matches(field, Recipe.model_fields, 1)
    return f"there is no option {field!r}" + (f"; do you mean {near[0]!r}?" if near else "")


def option_words(field: str, value: Any) -> list[str]:
    """A choice as the command line takes it: an option for each of several values, a flag without one."""
    words = []
    for one in value if isinstance(value, list) else [value]:
        words += [option_of(field), *([] if one is True else [str(one)])]
    return words


def bounds(field: str) -> str:
    """Limits of a number, as people write them: `at least 64MiB`; empty where nothing is said."""
    sized = {"memory", "device_memory", "shard_size"}
    found = {}
    for limit in _limits(Recipe.model_fields[field]):
        for kind in ("ge", "le", "lt"):
            value = getattr(limit, kind, None)
            if value is not None:
                value = value - 1 if kind == "lt" else value
                found["ge" if kind == "ge" else "le"] = binary(value) if field in sized else f"{int(value):,}"
    if len(found) == 2:
        return f"{found['ge']} to {found['le']}"
    words = {"ge": "at least", "le": "at most"}
    return "".join(f"{words[kind]} {value}" for kind, value in found.items())


def _limits(field: FieldInfo) -> list[Any]:
    """The constraints of a field, also of one that may be None."""
    inner = [limit for part in get_args(field.annotation) for limit in getattr(part, "__metadata__", ())]
    fields = [limit for limit in inner if isinstance(limit, FieldInfo)]
    return [*field.metadata, *inner, *(limit for nested in fields for limit in nested.metadata)]


def binary(nbytes: int) -> str:
    """`64MiB`: whole numbers of the largest binary unit that gives one."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if nbytes >= unit and nbytes % unit == 0:
            return f"{nbytes // unit}{name}"
    return f"{nbytes}B"


def option_of(field: str) -> str:
    """Option of the command line for a field."""
    return "--" + {"rules": "rule", "renames": "rename", "labels": "label"}.get(field, field.replace("_", "-"))


def how(choices: Mapping[str, Any]) -> str:
    """`fapm, density 0.1, scope tensor`: the method of a recipe's choices, and what it is given; of a merge how it
    is combined."""
    sources = choices.get("merged") or choices.get("sources")
    if sources:
        return f"{choices.get('combine', 'sum')} of {len(sources)} fine-tuned checkpoints"
    method = METHODS[choices["method"]]
    scope = f", scope {choices['scope']}" if len(method.scopes) > 1 else ""
    value = choices.get(method.parameter, Recipe.model_fields[method.parameter].default)
    scaled = f", layer scale {choices['layer_scale']}" if choices.get("layer_scale") else ""
    return f"{choices['method']}, {method.symbol} {value:g}{scope}{scaled}"


def command_words(recipe: Recipe) -> list[str]:
    """The words after `fapm` that make this recipe again: what the method is given always, else what is not usual."""
    given = recipe.model_dump(mode="json", exclude_defaults=True)
    merged, words = given.pop("merged", []), []
    words = ["merge" if merged else "prune", *option_words("base", given.pop("base"))]
    for lane, source in zip(recipe.lanes, merged, strict=False):
        said = {"finetuned": lane.finetuned, "weight": source.get("weight", 1.0)}
        said |= {name: getattr(lane, name) for name in OF_A_SOURCE}
        words += [word for name, value in said.items() for word in option_words(name, value)]
    if merged:
        given = {name: value for name, value in given.items() if name not in ("finetuned", *OF_A_SOURCE)}
        given = {"out": given.pop("out"), "combine": recipe.combine, **given}
    else:
        said = {"finetuned": given.pop("finetuned"), "out": given.pop("out")}
        given = said | {METHODS[recipe.method].parameter: recipe.parameter} | given
    for name, value in given.items():
        words += option_words(name, value)
    return words


def template() -> str:
    """A recipe in YAML with every choice and what it means; those that have a default stand in comments with it."""
    lines = ["# A recipe for `fapm prune --config`. What stands in brackets is the default; remove the # to choose."]
    for name, field in Recipe.model_fields.items():
        lines += ["", *textwrap.wrap(DESCRIPTIONS[name], 110, initial_indent="# ", subsequent_indent="# ")]
        if field.is_required():
            lines.append(f"{name}: {name.upper()}")
        else:
            default: Any = list(field.default) if isinstance(field.default, tuple) else field.default
            default = binary(default) if name == "memory" else default
            lines.append("#" + yaml.safe_dump({name: default}).strip())
    return "\n".join([*lines, "", "# off, local, or a cluster's ADDRESS.", "#ray: local", ""])


def _sentence(error: Any, choices: dict[str, Any]) -> str:
    field = ".".join(str(part) for part in error["loc"] if isinstance(part, str))
    if error["type"] == "extra_forbidden":
        return _no_such(field)
    option = option_of(field)
    if error["type"] == "missing":
        return f"{option} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if field == "rules":  # it names the rule
        return f"{option}: {message}"
    if error["type"] in ("greater_than_equal", "less_than_equal", "less_than"):
        message = bounds(field)
    elif error["type"] == "literal_error":
        message = f"choose {error['ctx']['expected']}"
    elif field == "device":
        message = "choose auto, cpu, cuda or cuda:N"
    typed = choices.get(field, error["input"])
    if field in ("method", "scope", "density") and (isinstance(typed, list) or "," in str(typed)):
        message = "give one value; several are for fapm sweep"
    shown = typed if isinstance(typed, str) else reprlib.repr(typed)
    return f"{option}: {message[0].lower()}{message[1:]} (it is {reprlib.repr(shown)[1:-1]})"
