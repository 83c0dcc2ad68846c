"""An output as a whole, as those need it who load it: names, shapes and configuration that fit each other.

By other code than what wrote it, from the files that lie there alone. What a library would say of it is asked of the
library (`refused_by_transformers`): transformers builds the model without its weights and compares names and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fapm.errors import UserError
from fapm.formats.tensor import TensorInfo
from fapm.storage.records import parse
from fapm.storage.store import Store

_OF_AN_ADAPTER = re.compile(r"\.(base_layer|lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save)(\.|$)")
_OF_CODES = re.compile(
    r"(^|\.)(weight_scale(_inv)?|scale_weight|input_scale|weight_packed|qweight|qzeros|\w+_scale_inv)$"
)
_DESCRIPTIONS = ("quantization_config", "compression_config")
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|shared)\.weight$")


def check_folder(folder: Store, tensors: Mapping[str, TensorInfo], base: Collection[str]) -> list[str]:
    """Contradictions inside an output, a sentence each.

    Args:
        tensors: those of the output's files, by name. base: the names of base's, which are the model's own.
    """
    problems = []
    for name in tensors:
        what = "an adapter" if _OF_AN_ADAPTER.search(name) else "codes" if _OF_CODES.search(name) else ""
        if what and name not in base:
            problems.append(f"tensor {name!r}: it belongs to {what} that should have become part of the weights")
    if folder.has("adapter_config.json"):
        problems.append("adapter_config.json: libraries would take the output for an adapter")
    config = _object(folder, "config.json")
    if config is not None:
        problems += _against(config, tensors)
    if folder.has("hf_quant_config.json") and not any(t.dtype.startswith("F8") for t in tensors.values()):
        problems.append("hf_quant_config.json: it speaks of codes, and there are none")
    problems += _check_modules(folder, tensors)
    return problems


def _against(config: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    codes = any(t.dtype.startswith(("F8", "F4", "U8", "I8")) for t in tensors.values())
    for part in _parts(config):
        for key in _DESCRIPTIONS:
            if part.get(key) and not codes:
                yield f"config.json: {key} speaks of codes, and there are none"
    sizes = {size for part in _parts(config) if type(size := part.get("vocab_size")) is int}
    for name, info in tensors.items():
        if _EMBEDDINGS.search(name) and len(info.shape) == 2 and sizes and info.shape[0] not in sizes:
            yield f"tensor {name!r}: it has {info.shape[0]} rows, and config.json says vocab_size {sorted(sizes)}"
    hidden = config.get("hidden_size")
    embeddings = [name for name in tensors if _EMBEDDINGS.search(name)]
    for name in embeddings:
        if type(hidden) is int and "embedding_size" not in config and len(tensors[name].shape) == 2:
            columns = tensors[name].shape[1]
            if columns != hidden and len(embeddings) == 1 and not any("hidden_size" in p for p in _inner(config)):
                yield f"tensor {name!r}: it has {columns} columns, and config.json says hidden_size {hidden}"


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    yield from _inner(config)


def _inner(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for value in config.values():
        if isinstance(value, dict):
            yield from _parts(value)


def _check_modules(folder: Store, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Whether each folder that a model of several names is there, with weights if its module has any."""
    if not folder.has("modules.json"):
        return []
    try:
        listed = parse(folder.read("modules.json"))
        kinds = [(str(module["path"]), str(module.get("type", ""))) for module in listed]
    except (ValueError, TypeError, KeyError, AttributeError):
        return ["modules.json: it does not list the folders of a model"]
    problems = []
    for path, kind in kinds:
        has_weights = kind.endswith((".Dense", ".LSTM", ".CNN", ".WeightedLayerPooling"))
        if path and has_weights and not any(name.startswith(f"{path}/") for name in tensors):
            problems.append(f"{path}: modules.json names it, and its weights are not there")
    return problems


def _object(folder: Store, name: str) -> dict[str, Any] | None:
    if not folder.has(name):
        return None
    try:
        found = parse(folder.read(name))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def refused_by_transformers(folder: Store) -> list[str]:
    """Complaints of transformers when it builds the model that an output's configuration names, without weights.

    Raises:
        UserError: it cannot be asked: the library is missing, the output is not on this machine, or names no class.
    """
    if not folder.local_path:
        raise UserError(f"--load: {folder.address} is not a folder of this machine")
    try:
        import transformers
    except ImportError:
        raise UserError("--load needs transformers: pip install 'fapm[eval]'") from None
    config = _object(folder, "config.json") or {}
    listed = config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else ""
    made = getattr(transformers, str(name), None) if name else None
    if made is None or not hasattr(made, "from_pretrained"):
        raise UserError(f"--load: config.json of {folder.address} names no class of transformers ({name or 'none'})")
    try:
        _, said = made.from_pretrained(
            str(folder.local_path),
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:
        return [f"transformers does not load it: {type(error).__name__}: {' '.join(str(error).split())[:300]}"]
    problems = []
    for key, what in (
        ("missing_keys", "has no values for it"),
        ("unexpected_keys", "has no use for it"),
        ("mismatched_keys", "wants another shape"),
    ):
        for found in sorted(map(str, said.get(key) or ())):
            problems.append(f"{found}: transformers' {name} {what}")
    return problems
