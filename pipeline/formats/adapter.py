"""LoRA adapters as PEFT saves them: what base becomes with one, without a merged copy anywhere.

The definitions are PEFT's (`merge_and_unload`), but added up in float32 and rounded once.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any

from fapm.errors import UserError
from fapm.formats.dtypes import is_weight
from fapm.formats.lowrank import Added, Converted, LowRank, Rows
from fapm.formats.names import EMBEDDING, HEAD, as_in_memory, renamed
from fapm.formats.tensor import Part, Side, TensorInfo, formed
from fapm.storage.records import parse

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PICKLED = "adapter_model.bin"

_KEY = re.compile(
    r"(?P<module>.+?)\.(?:token_adapter\.)?"
    r"(?P<what>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|trainable_tokens_delta)"
    r"(?:\.(?!weight$|bias$)\w+)?(?:\.(?P<leaf>weight|bias))?"
)
# What changes base itself when training begins, so that the adapter belongs to another base than the one that is given.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_READ = (
    "peft_type", "peft_version", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "fan_in_fan_out", "target_parameters", "token_indices", "trainable_token_indices", "init_lora_weights",
    "modules_to_save", "lora_bias", "ensure_weight_tying",
)  # fmt: skip
_SAYS_NOTHING = (
    "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "target_modules",
    "exclude_modules", "lora_dropout", "bias", "layers_to_transform", "layers_pattern", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config", "base_model_class",
    "parent_library", "unsloth_fixed", "unsloth_version", "qat_scheme",
)  # fmt: skip
"""Settings that change how an adapter is trained or served, and not what base becomes with it."""
_MOST_CHARACTERS = 300  # of a module's name, to be matched with patterns

TRANSPOSED = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")
"""Types of models that keep stacked experts as (experts, in, out): transformers' `is_transposed`, as of 5.24."""


@dataclass(frozen=True)
class Adapter:
    """adapter_config.json, as far as it decides what base becomes.

    Attributes:
        version: of the PEFT that wrote it, (0, 0) from before it said so.
        saved: the modules that were trained whole, by the ends of their names.
        tied: a head that is the embedding stayed so.
    """

    r: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False
    fan_in_fan_out: bool = False
    target_parameters: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    version: tuple[int, int] | None = (0, 0)
    saved: tuple[str, ...] = ()
    tied: bool = False

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
    return next((pattern for pattern in patterns if _compiled(pattern).match(module)), module)


@lru_cache(1 << 14)
def _compiled(pattern: str) -> Any:
    """A pattern as PEFT matches it, by an engine whose time grows with the length of the name alone."""
    import re2

    return re2.compile(rf"(?:.*\.)?(?:{pattern})$", _re2_options())


@cache
def _re2_options() -> Any:
    import re2

    options = re2.Options()
    options.log_errors = False
    options.max_mem = 1 << 20
    return options


def read_adapter(data: bytes, where: str) -> Adapter:
    """Contents of adapter_config.json.

    Raises:
        UserError: it is none, or of a kind that base cannot be given exactly.
    """

    def bad(why: str) -> UserError:
        return UserError(f"{where}: {CONFIG}: {why}")

    try:
        said = parse(data)
        assert isinstance(said, dict)
    except (ValueError, AssertionError):
        raise bad("not a JSON object") from None
    kind = said.get("peft_type")
    if kind not in ("LORA", "TRAINABLE_TOKENS"):
        raise bad(f"an adapter of type {str(kind)[:40]!r}; LORA is read here. Merge it into its base with PEFT first")
    others = [str(name) for name, value in said.items() if value and name not in (*_READ, *_SAYS_NOTHING)]
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
            {_pattern(k): _integer(v) for k, v in _few(said.get("rank_pattern") or {}).items()},
            {_pattern(k): _number(v) for k, v in _few(said.get("alpha_pattern") or {}).items()},
            bool(said.get("use_rslora")), bool(said.get("fan_in_fan_out")),
            tuple(str(name) for name in _few(said.get("target_parameters") or ())),
            {str(name): tuple(_integer(i, 0) for i in rows) for name, rows in _few(tokens).items()},
            _version(said.get("peft_version")), tuple(str(name) for name in _few(said.get("modules_to_save") or ())),
            bool(said.get("ensure_weight_tying")),
        )  # fmt: skip
    except (ValueError, TypeError, AttributeError) as error:
        raise bad(str(error) or "it says something else than it should") from None


def _version(text: Any) -> tuple[int, int] | None:
    """Major and minor version; None where it is not known to which of two a version between them belongs."""
    if text is None:
        return 0, 0
    found = re.match(r"(\d{1,4})\.(\d{1,4})(.*)", str(text)[:100])
    if not found or "dev" in found[3]:
        return None
    return int(found[1]), int(found[2])


_MOST_PATTERNS = 20_000
_MOST_MATCHED = 10_000_000  # characters of patterns, or names twice, once for each module
_NAME = re.compile(r"[\w.-]+")  # as nearly all patterns are


def _few(listed: Any) -> Any:
    if len(listed) > _MOST_PATTERNS or any(len(str(name)) > _MOST_CHARACTERS for name in listed):
        raise ValueError("it names more modules, or longer ones, than any model has")
    return listed


def _integer(value: Any, least: int = 1) -> int:
    if type(value) is not int or not least <= value < 1 << 31:
        raise ValueError(f"{str(value)[:40]} where a whole number should be")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e9:
        raise ValueError(f"{str(value)[:40]} where a number above 0 should be")
    return float(value)


def _pattern(text: Any) -> str:
    """A pattern of module names, which can be matched without trying again (no look-ahead, no back-reference)."""
    try:
        if not _NAME.fullmatch(text):
            _compiled(text)
    except Exception:  # re2's own error, or one of a text that it cannot take
        raise ValueError(f"the pattern {str(text)[:40]!r} is not one of module names") from None
    return str(text)


def apply_adapter(
    adapter: Adapter,
    tensors: Mapping[str, TensorInfo],
    base: Mapping[str, TensorInfo],
    kinds: Collection[str],
    where: str,
    side: Side = "base",
) -> dict[str, TensorInfo]:
    """Every tensor that base becomes with an adapter: base's own, formed ones, and new ones of the adapter.

    Args:
        tensors: the adapter's, by their names without PEFT's prefix.
        base: base's tensors as seen from the other side, by the names that the adapter uses.
        kinds: the `model_type`s of base's configuration, none where it has none or brings code of its own.
        where: what to call the adapter in an error.
        side: on which base's tensors lie.

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
            if what in modules[module, path.count(".base_layer")]:
                raise UserError(f"{where}: it has several adapters of {module}; save the one that counts on its own")
            modules[module, path.count(".base_layer")][what] = info
        else:
            target = re.sub(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)", "", name)
            if target not in base and not _is_saved(target, adapter.saved):
                raise UserError(
                    f"{where}: it is not known what {name} means: it is no update of a LoRA, base has no tensor of "
                    f"that name, and {CONFIG} does not list it in modules_to_save; merge the adapter with PEFT first"
                )
            result[target] = whole[target] = _replaced(target, info, base.get(target))
    for patterns in (adapter.rank_pattern, adapter.alpha_pattern):
        others = sum(len(pattern) for pattern in patterns if not _NAME.fullmatch(pattern))
        if max(2 * len(patterns), others) * len(modules) > _MOST_MATCHED:
            raise UserError(
                f"{where}: {CONFIG} has {len(patterns)} patterns for {len(modules)} modules, which would take too long "
                "to match; merge the adapter with PEFT first"
            )
    turned, taken = _turned(adapter, modules, base, where), set[tuple[str, str]]()
    for (module, depth), found in sorted(modules.items(), key=lambda item: (item[0][0], -item[0][1])):
        known = f"{module}.weight"
        if known not in base and "lora_A" in found and "lora_B" in found:
            _add_to_parameter(adapter, module, depth, found, base, result, kinds, where, side, taken)
            continue
        if known not in base:
            raise UserError(f"{where}: it changes {module}, which base does not have")
        over = Part("finetuned", whole[known]) if known in whole else Part(side, base[known])
        if "trainable_tokens_delta" in found:
            result[known] = _with_rows(adapter, module, over, found.pop("trainable_tokens_delta"), where)
            over = Part("finetuned", result[known])
        bias = found.pop("lora_B.bias", None)
        if found:
            form = _low_rank(adapter, module, over, found, turned, where)
            result[known] = formed(known, over.info.dtype, over.info.shape, form)
            if bias is not None:
                name = f"{module}.bias"
                if name not in base or bias.numel != base[name].numel:
                    raise UserError(f"{where}: it changes {name}, which base does not have")
                added = Added(Part(side, base[name]), Part("finetuned", bias), form.scale)
                result[name] = formed(name, base[name].dtype, base[name].shape, added)
    return result


_UNMERGED = re.compile(
    r"\.(base_layer|lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|modules_to_save|"
    r"original_module|token_adapter|trainable_tokens_delta|lora_\w+)(\.|$)"
)


def of_training(tensors: Iterable[str]) -> list[str]:
    """The names that only a model with an adapter around it has."""
    return [name for name in tensors if _UNMERGED.search(name)]


def unmerged(
    adapter: Adapter, tensors: Mapping[str, TensorInfo], kinds: Collection[str], where: str, side: Side
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """A whole model from a state dict with an adapter in it, and why the tensors that are not in it are not.

    Raises:
        UserError: as of `apply_adapter`.
    """
    own: dict[str, TensorInfo] = {}
    theirs: dict[str, TensorInfo] = {}
    gone: dict[str, str] = {}
    for name, info in tensors.items():
        bare = re.sub(r"\.(?:base_layer|original_module)(?=\.)", "", name)
        if _KEY.fullmatch(name) or ".modules_to_save." in name:
            theirs[name] = info
        elif ".original_module." in name:
            gone[name] = "it was trained whole, and is as it was before"
            own.setdefault(bare, info if bare == name else replace(info, name=bare))
        else:
            own[bare] = info if bare == name else replace(info, name=bare)
    found = apply_adapter(adapter, theirs, own, kinds, where, side)
    return found, gone


def without_tied_head(
    adapter: Adapter, tensors: Mapping[str, TensorInfo], base: Mapping[str, TensorInfo], where: str
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """An adapter's tensors for a base whose head is its embedding, and why those that are left out are not needed.

    Trained whole, both are what was trained. An update of one is used in training where it was added, and merged by
    PEFT into the matrix that both share, of both twice: so it is not known what is meant.

    Raises:
        UserError: it holds such an update, or an embedding without the head that it leaves behind.
    """
    if any(HEAD.search(name) for name in base):
        return dict(tensors), {}
    updated = [m["module"] for name in tensors if (m := _KEY.fullmatch(name)) and "lora" in m["what"]]
    tied = [name for name in updated if HEAD.search(f"{name}.weight") or EMBEDDING.search(f"{name}.weight")]
    if tied:
        raise UserError(
            f"{where}: it updates {tied[0]}, and base ties its head to its embedding: in training that changed one of "
            "them, merged by PEFT both. Save base with tie_word_embeddings=False and a head of its own, or merge the "
            "adapter as you mean it and give the merged checkpoint"
        )
    whole = [name for name in tensors if not _KEY.fullmatch(name)]
    heads = [name for name in whole if HEAD.search(name)]
    embeddings = [name for name in whole if EMBEDDING.search(name)]
    if embeddings and not heads:
        raise UserError(
            f"{where}: it holds {embeddings[0]} and no head, and base ties its head to its embedding: the head is "
            "still base's embedding. Merge the adapter with PEFT, which saves both, and give the merged checkpoint"
        )
    if adapter.tied and embeddings:
        return {name: info for name, info in tensors.items() if name not in heads}, dict.fromkeys(
            heads, "it is the embedding once more (ensure_weight_tying)"
        )
    return dict(tensors), {}


def _is_saved(name: str, modules: Iterable[str]) -> bool:
    """Whether a tensor belongs to a module that was trained whole."""
    parts = name.split(".")
    return any(
        parts[i : i + len(wanted)] == wanted
        for wanted in (module.split(".") for module in modules)
        for i in range(len(parts) - len(wanted))
    )


def _turned(
    adapter: Adapter, modules: Mapping[tuple[str, int], Mapping[str, TensorInfo]], base: Mapping[str, TensorInfo],
    where: str,
) -> bool:  # fmt: skip
    """Whether square matrices are stored as (in, out), as `fan_in_fan_out` says.

    Raises:
        UserError: a matrix that is not square shows that this does not hold for all, and there are square ones.
    """
    shown: dict[bool, str] = {}
    square = ""
    for (module, _), found in modules.items():
        a, b, info = found.get("lora_A"), found.get("lora_B"), base.get(f"{module}.weight")
        if a and b and info and len(a.shape) == len(b.shape) == len(info.shape) == 2:
            straight, turned = (b.shape[0], a.shape[1]) == info.shape, (a.shape[1], b.shape[0]) == info.shape
            if straight and turned:
                square = square or module
            elif straight or turned:
                shown[turned] = module
    said = adapter.fan_in_fan_out
    if square and (not said) in shown:
        raise UserError(
            f"{where}: {CONFIG} says fan_in_fan_out: {str(said).lower()}, which does not hold for {shown[not said]}, "
            f"so it is not known how {square}, which is square, is stored; merge the adapter with PEFT first"
        )
    return said


def with_adapter(
    adapter: Adapter, tensors: Mapping[str, TensorInfo], base: Mapping[str, TensorInfo], renames: Sequence[str],
    kinds: Collection[str], where: str, warnings: list[str],
) -> dict[str, TensorInfo]:  # fmt: skip
    """Base with an adapter applied, by base's names and packed as base is. The rest is as of `apply_adapter`."""
    own, made = as_in_memory(base)
    view = renamed(own, _targets(tensors), renames, warnings)
    names = dict(zip(view, own, strict=True))  # in the same order
    result = {}
    for name, info in apply_adapter(adapter, tensors, view, kinds, where).items():
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
    """Tensors that the adapter holds whole, in base's dtype."""
    if base and base.dtype != info.dtype and is_weight(base.dtype) and is_weight(info.dtype):
        return formed(name, base.dtype, info.shape, Converted(Part("finetuned", info), base.dtype))
    return replace(info, name=name)


def _with_rows(adapter: Adapter, module: str, over: Part, delta: TensorInfo, where: str) -> TensorInfo:
    rows = next((rows for name, rows in adapter.tokens.items() if f".{module}".endswith(f".{name}")), ())
    if not rows and len(adapter.tokens) == 1 and re.search(r"(^|\.)(lm_head|embed_out)$", module):  # tied to it
        rows = next(iter(adapter.tokens.values()))
    shape = over.info.shape
    if len(shape) != 2 or delta.shape != (len(rows), shape[1]) or max(rows, default=0) >= shape[0]:
        raise UserError(f"{where}: the trained tokens of {module} do not fit base's {list(shape)}")
    return formed(f"{module}.weight", over.info.dtype, shape, Rows(over, Part("finetuned", delta), rows))


def _low_rank(
    adapter: Adapter, module: str, over: Part, found: dict[str, TensorInfo], square_turned: bool, where: str
) -> LowRank:
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
    straight = straight and not embedding  # whose rows are what goes in
    transposed = turned and (square_turned or not straight)
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
    base: Mapping[str, TensorInfo], result: dict[str, TensorInfo], kinds: Collection[str], where: str, side: Side,
    taken: set[tuple[str, str]],
) -> None:  # fmt: skip
    """A wrapper of a module's parameter, as PEFT makes them for `target_parameters`.

    Several are nested in the order in which the model defines them, which no file says: the one that A and B fit is
    meant, if there is only one.
    """
    a, b = found["lora_A"], found["lora_B"]
    targets = [name for name in adapter.target_parameters if _is_target(module, name)]
    names = sorted({last for t in targets if f"{module}.{(last := t.rpartition('.')[2])}" in base})
    fitting = [name for name in names if _orientation(a, b, base[f"{module}.{name}"].shape)]
    if found.keys() != {"lora_A", "lora_B"} or not names or depth >= len(names):
        many = " (experts one by one: unsloth's layout?)" if re.search(r"_projs\.\d+$", module) else ""
        raise UserError(
            f"{where}: it changes {module}{many}, and base has no such module, and no tensor of it that {CONFIG} lists "
            "in target_parameters; merge the adapter into its base with the library that made it"
        )
    if len(fitting) != 1 or (module, fitting[0]) in taken:
        shapes = ", ".join(name + " " + str(list(base[module + "." + name].shape)) for name in names)
        raise UserError(
            f"{where}: A {list(a.shape)} and B {list(b.shape)} of {module} fit {' and '.join(fitting) or 'none'} of "
            f"{shapes}; merge the adapter into its base with PEFT first"
        )
    taken.add((module, fitting[0]))
    name = f"{module}.{fitting[0]}"
    info = base[name]
    orientation = _orientation(a, b, info.shape)
    assert orientation
    straight, turned = orientation
    if straight and turned and len(info.shape) == 3:
        turned = _keeps_in_first(adapter, name, kinds, where)
        straight = not turned
    transposed = turned and not straight
    shape = info.shape if len(info.shape) == 3 else (1, *info.shape)
    if transposed and shape[0] == 1 and len(info.shape) == 3:
        raise UserError(f"{where}: {name} is a stack of one matrix, which PEFT itself does not merge into (in, out)")
    stack, rank = shape[0], a.shape[0] // shape[0]
    scale = adapter.scale(f"{module}.{name.rpartition('.')[2]}", rank, where)
    parts = (Part(side, info), Part("finetuned", a), Part("finetuned", b))
    form = LowRank(*parts, scale, shape[1], shape[2], stack=stack, transposed=transposed)
    result[name] = formed(name, info.dtype, info.shape, form)


def _is_target(module: str, target: str) -> bool:
    """Whether a target parameter, a whole name or its end, may lie in a module."""
    of = target.rpartition(".")[0]
    return not of or f".{module}".endswith(f".{of}")


def _keeps_in_first(adapter: Adapter, name: str, kinds: Collection[str], where: str) -> bool:
    """Whether square experts are (experts, in, out) to PEFT: to 0.18 all were, since then the model's module says.

    Raises:
        UserError: that is not known.
    """
    if adapter.version and adapter.version < (0, 19):
        return True
    if adapter.version is None or not kinds:
        unknown = "base's configuration names no type of model" if adapter.version else "peft_version is no release"
        raise UserError(
            f"{where}: the experts of {name} are square, so how A and B belong to them depends on the version of PEFT "
            f"and on the model, and {unknown}; merge the adapter into its base with PEFT first"
        )
    return any(kind in TRANSPOSED for kind in kinds)


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
