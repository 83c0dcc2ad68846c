"""Side files, which go with the tensors: which of them come along, and what in them is code."""

from __future__ import annotations

import json
from typing import Any

from fapm.storage.records import parse

# What a checkpoint needs beside its weights. Anything else (optimizer states, logs, other formats) stays behind.
_SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".py", ".md", ".tiktoken", ".vocab", ".bpe", ".spm", ".yaml")
_SIDE_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".npz", ".pkl")
_NOT_THE_MODEL = ("fapm", "runs", "logs", "checkpoint-", "original", "global_step")
TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "spiece")
MODEL_CONFIG = "config.json"
CARD = "README.md"
MAX_CONFIG_BYTES = 16 << 20
MAX_SIDE_BYTES = 256 << 20
_TRAINING_STATE = ("trainer_state.json", CARD, "adapter_config.json")


def side_files_of(found: dict[str, Any]) -> tuple[tuple[str, ...], list[str]]:
    """The files to copy, and what is left: what looks like weights (states of training, other formats, other folders),
    and what is too large."""
    side: list[str] = []
    left: list[str] = []
    for name, stat in found.items():
        *folders, file = name.split("/")
        if len(folders) > 2 or any(f.startswith(_NOT_THE_MODEL) for f in folders):
            continue
        if file.endswith(WEIGHT_SUFFIXES):
            if not folders or file.endswith((".safetensors", ".bin")):
                left.append(name)
        elif file.endswith(".index.json") or file in _TRAINING_STATE:
            continue
        elif file.endswith(_SIDE_SUFFIXES) or file.startswith(_SIDE_NAMES):
            (side if stat.size <= MAX_SIDE_BYTES else left).append(name)
    return tuple(side), left


def is_code(name: str) -> bool:
    """Whether transformers would run a file if it is told to trust a checkpoint."""
    return name.endswith(".py")


def without_code(name: str, data: bytes) -> bytes:
    """A JSON file without `auto_map`, which names the classes to run; any other as it is."""
    if not name.endswith(".json") or b"auto_map" not in data or len(data) > MAX_CONFIG_BYTES:
        return data
    try:
        loaded = parse(data)
    except ValueError:
        return data
    if not isinstance(loaded, dict) or "auto_map" not in loaded:
        return data
    del loaded["auto_map"]
    return (json.dumps(loaded, indent=2, ensure_ascii=False) + "\n").encode()
