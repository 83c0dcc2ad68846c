"""LoRA adapters as PEFT saves them: what base becomes with one, without a merged copy anywhere.

The definitions are PEFT's (`merge_and_unload`), but added up in float32 and rounded once.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.errors import UserError
from pipeline.formats.dtypes import is_weight
from pipeline.formats.lowrank import Added, Converted, LowRank, Rows
from pipeline.formats.names import as_in_memory, renamed
from pipeline.formats.tensor import Part, TensorInfo, formed

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

_KEY = re.compile(
    r"(?P<module>.+?)\.(?:token_adapter\.)?"
    r"(?P<what>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|trainable_tokens_delta)"
    r"(?:\.(?!weight$|bias$)\w+)?(?:\.(?P<leaf>weight|bias))?"
)
# What changes base itself when training begins, so that the adapter belongs to another base than the one that is given.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_REFUSED = (
    "layer_replication", "alora_invocation_tokens", "arrow_config", "megatron_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip
_MOST_CHARACTERS = 300  # of a module's name, to be matched with patterns
_KNOWN_USES = ("use_rslora", "use_dora")


@dataclass(frozen=True)
class Adapter:
    """adapter_config.json, as far as it decides what base becomes."""

    r: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False
    fan_in_fan_out: bool = False
    target_parameters: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def scale(self, module: str, rank: int, where: str) -> float:
        """s of a module whose A has `rank` rows.

        Raises:
            UserError: the configuration gives it another rank.
        """
        said = self.rank_pattern.get(_pattern_for(module, self.rank_pattern), self.r)
        if said != rank:
            raise UserError(f"{where}: {CONFIG} gives {module} the rank {said}, and its A has {rank}")
        alpha = self.alpha_pattern.get(_pattern_for(module, self.alpha_pattern), self.alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank


def _pattern_for(module: str, patterns: Iterable[str]) -> str:
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), module)


def read_adapter(data: bytes, where: str) -> Adapter:
    """What adapter_config.json says.

    Raises:
        UserError: it is none, or of a kind that base cannot be given exactly.
    """

    def bad(why: str) -> UserError:
        return UserError(f"{where}: {CONFIG}: {why}")

    try:
        said = json.loads(data)
        assert isinstance(said, dict)
    except (ValueError, RecursionError, AssertionError):
        raise bad("not a JSON object") from None
    kind = said.get("peft_type")
    if kind not in ("LORA", "TRAINABLE_TOKENS"):
        raise bad(f"an adapter of type {str(kind)[:40]!r}; LORA is read here. Merge it into its base with PEFT first")
    uses = [name for name, value in said.items() if str(name).startswith("use_") and value]
    others = [name for name in uses if name not in _KNOWN_USES] + [name for name in _REFUSED if said.get(name)]
    if others:
        raise bad(f"{others[0][:40]} is not read here; merge the adapter into its base with PEFT first")
    init = said.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_OTHER_BASE):
        raise bad(
            f"init_lora_weights is {init[:40]!r}: it was trained on a base that this changed. Save it with PEFT's "
            "path_initial_model_for_weight_conversion, or merge it first"
        )
    tokens = said.get("token_indices" if kind == "TRAINABLE_TOKENS" else "trainable_token_indices") or {}
    tokens = {"embed_tokens": tokens} if isinstance(tokens, list) else tokens
    try:
        return Adapter(
            _integer(said.get("r", 8)), _number(said.get("lora_alpha", 8)),
            {_pattern(k): _integer(v) for k, v in (said.get("rank_pattern") or {}).items()},
            {_pattern(k): _number(v) for k, v in (said.get("alpha_pattern") or {}).items()},
            bool(said.get("use_rslora")), bool(said.get("fan_in_fan_out")),
            tuple(str(name) for name in said.get("target_parameters") or ()),
            {str(name): tuple(_integer(i, 0) for i in rows) for name, rows in tokens.items()},
        )  # fmt: skip
    except (ValueError, TypeError, AttributeError) as error:
        raise bad(str(error) or "it says something else than it should") from None


def _integer(value: Any, least: int = 1) -> int:
    if type(value) is not int or not least <= value < 1 << 31:
        raise ValueError(f"{str(value)[:40]} where a whole number should be")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{str(value)[:40]} where a number should be")
    return float(value)


def _pattern(text: Any) -> str:
    """A pattern of module names; none that could take for ever to match."""
    if (
        not isinstance(text, str)
        or len(text) > 500
        or re.search(r"\)[*+{]", text)
        or len(re.findall("[*+{]", text)) > 2
    ):
        raise ValueError(f"the pattern {str(text)[:40]!r} is not one of module names")
    try:
        re.compile(text)
    except re.error:
        raise ValueError(f"the pattern {text[:40]!r} is not one of module names") from None
    return text


def apply_adapter(
    adapter: Adapter, tensors: Mapping[str, TensorInfo], base: Mapping[str, TensorInfo], where: str
) -> dict[str, TensorInfo]:
    """Every tensor that base becomes with an adapter: base's own, formed ones, and new ones of the adapter.

    Args:
        tensors: the adapter's, by their names without PEFT's prefix.
        base: base's tensors as seen from the other side, by the names that the adapter uses.
        where: what to call the adapter in an error.

    Raises:
        UserError: it does not fit base, or not all of it is understood.
    """
    result = dict(base)
    whole: dict[str, TensorInfo] = {}
    modules: dict[tuple[str, int], dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in tensors.items():
        matched = _KEY.fullmatch(name)
        if matched:
            path = matched["module"]
            if len(path) > _MOST_CHARACTERS:
                raise UserError(f"{where}: it changes {path[:40]}…, a longer name than any module has")
            module = re.sub(r"\.base_layer(?=\.|$)", "", path)
            what = matched["what"] + (".bias" if matched["leaf"] == "bias" else "")
            modules[module, path.count(".base_layer")][what] = info
        else:
            target = re.sub(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)", "", name)
            result[target] = whole[target] = _replaced(target, info, base.get(target))
    for (module, depth), found in sorted(modules.items(), key=lambda item: (item[0][0], -item[0][1])):
        known = f"{module}.weight"
        if known not in base and "lora_A" in found and "lora_B" in found:
            _add_to_parameter(adapter, module, depth, found, base, result, where)
            continue
        if known not in base:
            raise UserError(f"{where}: it changes {module}, which base does not have")
        over = Part("finetuned", whole[known]) if known in whole else Part("base", base[known])
        if "trainable_tokens_delta" in found:
            result[known] = _with_rows(adapter, module, over, found.pop("trainable_tokens_delta"), where)
            over = Part("finetuned", result[known])
        bias = found.pop("lora_B.bias", None)
        if found:
            form = _low_rank(adapter, module, over, found, where)
            result[known] = formed(known, over.info.dtype, over.info.shape, form)
            if bias is not None:
                name = f"{module}.bias"
                if name not in base or bias.numel != base[name].numel:
                    raise UserError(f"{where}: it changes {name}, which base does not have")
                added = Added(Part("base", base[name]), Part("finetuned", bias), form.scale)
                result[name] = formed(name, base[name].dtype, base[name].shape, added)
    return result


def with_adapter(
    adapter: Adapter, tensors: Mapping[str, TensorInfo], base: Mapping[str, TensorInfo], renames: Sequence[str],
    where: str, oddities: list[str],
) -> dict[str, TensorInfo]:  # fmt: skip
    """What base becomes with an adapter, by base's names and packed as base is. The rest is as of `apply_adapter`."""
    own, made = as_in_memory(base)
    view = renamed(own, _targets(tensors), renames, oddities)
    names = dict(zip(view, own, strict=True))  # in the same order
    result = {}
    for name, info in apply_adapter(adapter, tensors, view, where).items():
        stack = made.get(names.get(name, name))
        if stack is None:
            old = names.get(name, name)
            result[old] = info if info.name == old else replace(info, name=old)
        elif isinstance(info.form, LowRank):
            for member in stack.members:
                over = Part("base", base[member.name])
                form = replace(info.form, over=over, first=member.expert, row=member.row, rows=member.rows)
                result[member.name] = formed(member.name, stack.dtype, base[member.name].shape, form)
    return result


def _targets(tensors: Mapping[str, TensorInfo]) -> set[str]:
    """The names in base that an adapter's tensors may mean."""
    found = set()
    for name in tensors:
        matched = _KEY.fullmatch(name)
        bare = re.sub(r"\.base_layer(?=\.|$)", "", matched["module"] + ".weight" if matched else name)
        found.add(bare)
    return found


def _replaced(name: str, info: TensorInfo, base: TensorInfo | None) -> TensorInfo:
    """What the adapter holds whole, in base's dtype."""
    if base and base.dtype != info.dtype and is_weight(base.dtype) and is_weight(info.dtype):
        return formed(name, base.dtype, info.shape, Converted(Part("finetuned", info), base.dtype))
    return replace(info, name=name)


def _with_rows(adapter: Adapter, module: str, over: Part, delta: TensorInfo, where: str) -> TensorInfo:
    rows = next((rows for name, rows in adapter.tokens.items() if f".{module}".endswith(f".{name}")), ())
    if not rows and len(adapter.tokens) == 1:  # a head that is tied to the embedding
        rows = next(iter(adapter.tokens.values()))
    shape = over.info.shape
    if len(shape) != 2 or delta.shape != (len(rows), shape[1]) or max(rows, default=0) >= shape[0]:
        raise UserError(f"{where}: the trained tokens of {module} do not fit base's {list(shape)}")
    return formed(f"{module}.weight", over.info.dtype, shape, Rows(over, Part("finetuned", delta), rows))


def _low_rank(adapter: Adapter, module: str, over: Part, found: dict[str, TensorInfo], where: str) -> LowRank:
    embedding = "lora_embedding_A" in found
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    magnitude = found.get("lora_magnitude_vector")
    left = found.keys() - {*names, "lora_magnitude_vector"}
    if left or not all(name in found for name in names):
        raise UserError(f"{where}: {module} has {', '.join(sorted(found))}, which is not A and B of a LoRA")
    a, b = (found[name] for name in names)
    shape = over.info.shape
    if len(a.shape) != 2 or len(b.shape) != 2 or len(shape) != 2:
        raise UserError(f"{where}: {module} is no matrix (a convolution?); merge the adapter with PEFT first")
    rank = a.shape[0]
    straight, turned = (b.shape[0], a.shape[1]) == shape, (a.shape[1], b.shape[0]) == shape
    transposed = turned and (embedding or adapter.fan_in_fan_out or not straight)
    if b.shape[1] != rank or not (straight or turned) or not is_weight(over.info.dtype):
        raise UserError(
            f"{where}: A {list(a.shape)} and B {list(b.shape)} of {module} do not fit base's "
            f"{over.info.dtype} {list(shape)}"
        )
    if magnitude and magnitude.numel != b.shape[0]:
        raise UserError(f"{where}: the magnitudes of {module} are {magnitude.numel}, not one an output")
    parts = (Part("finetuned", a), Part("finetuned", b))
    scale = adapter.scale(module, rank, where)
    scaled = Part("finetuned", magnitude) if magnitude else None
    return LowRank(over, *parts, scale, shape[0], shape[1], transposed=transposed, magnitude=scaled)


def _add_to_parameter(
    adapter: Adapter, module: str, depth: int, found: dict[str, TensorInfo],
    base: Mapping[str, TensorInfo], result: dict[str, TensorInfo], where: str,
) -> None:  # fmt: skip
    """A wrapper of a module's parameter, as PEFT makes them for `target_parameters`: several are nested, by name."""
    a, b = found["lora_A"], found["lora_B"]
    wanted = sorted({name.rpartition(".")[2] for name in adapter.target_parameters})
    names = [name for name in wanted if f"{module}.{name}" in base]
    fitting = [name for name in names if _orientation(a, b, base[f"{module}.{name}"].shape)]
    if found.keys() != {"lora_A", "lora_B"} or not fitting:
        raise UserError(
            f"{where}: it changes {module}, and base has no tensor of that name that A {list(a.shape)} and "
            f"B {list(b.shape)} fit"
        )
    outermost_last = names[len(names) - 1 - depth] if depth < len(names) else ""
    name = f"{module}.{outermost_last if outermost_last in fitting else fitting[0]}"
    info = base[name]
    shape = info.shape if len(info.shape) == 3 else (1, *info.shape)
    stack, rank = shape[0], a.shape[0] // shape[0]
    straight, turned = _orientation(a, b, info.shape) or (False, False)
    transposed = turned and not straight
    scale = adapter.scale(f"{module}.{name.rpartition('.')[2]}", rank, where)
    parts = (Part("base", info), Part("finetuned", a), Part("finetuned", b))
    form = LowRank(*parts, scale, shape[1], shape[2], stack=stack, transposed=transposed)
    result[name] = formed(name, info.dtype, info.shape, form)


def _orientation(a: TensorInfo, b: TensorInfo, shape: tuple[int, ...]) -> tuple[bool, bool] | None:
    """Whether B·A fits a stack of (out, in), and whether one of (in, out); None if neither."""
    if len(shape) not in (2, 3) or len(a.shape) != 2 or len(b.shape) != 2:
        return None
    stack = shape[0] if len(shape) == 3 else 1
    if not stack or a.shape[0] % stack or b.shape[1] != a.shape[0] or not a.shape[0]:
        return None
    straight = (b.shape[0], a.shape[1]) == shape[-2:]
    turned = (a.shape[1], b.shape[0]) == shape[-2:]
    return (straight, turned) if straight or turned else None
