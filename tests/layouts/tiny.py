"""Tiny models of every architecture of transformers that is about language, alone or with vision."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

_KINDS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
)
_SIZES = {
    "vocab_size": 96, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24, "ffn_dim": 48, "d_ff": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "n_inner": 48,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "depth": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "max_position_embeddings": 64,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "out_hidden_size": 32, "first_k_dense_replace": 1, "image_size": 28, "patch_size": 14, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "shared_expert_intermediate_size": 24, "mlp_hidden_size": 48,
}  # fmt: skip


_NEVER_NOTHING = (
    "head_dim", "num_key_value_heads", "moe_intermediate_size", "num_experts", "n_group", "topk_group",
    "n_routed_experts", "num_local_experts", "num_experts_per_tok", "pad_token_id",
)  # fmt: skip


def architectures() -> list[tuple[str, str]]:
    """Types of models, and the class of each kind."""
    found = {}
    for kind in _KINDS:
        for model_type, name in getattr(modeling_auto, kind, {}).items():
            for one in name if isinstance(name, (list, tuple)) else [name]:
                found[model_type, one] = None
    return sorted(found)


def configuration(model_type: str, sizes: dict[str, Any] | None = None) -> Any:
    """The default configuration of a type, each part of it made small."""
    config = transformers.AutoConfig.for_model(model_type)
    for part in _parts(config):
        for name, value in (_SIZES if sizes is None else sizes).items():
            now = getattr(part, name, None)
            if (type(now) is int and now > value) or (now is None and name in _NEVER_NOTHING and hasattr(part, name)):
                with contextlib.suppress(Exception):
                    setattr(part, name, value)
        layers = getattr(part, "num_hidden_layers", None)
        if getattr(part, "layer_types", 0) is None and isinstance(layers, int):
            part.layer_types = ["full_attention"] * layers
        for name in ("layer_types", "layers_block_type", "mlp_layer_types", "block_types"):
            listed = getattr(part, name, None)
            if isinstance(listed, list) and isinstance(layers, int) and len(listed) > layers:
                with contextlib.suppress(Exception):
                    setattr(part, name, listed[-layers:])
    return config


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, transformers.PreTrainedConfig):
            yield from _parts(value)


def model(model_type: str, name: str, device: str = "cpu", sizes: dict[str, Any] | None = None) -> Any:
    """A model of random weights, or on `meta` of none."""
    made = getattr(transformers, name)
    config = configuration(model_type, sizes)
    wanted = made.config_class
    if not isinstance(config, wanted):  # a text model of a composite type, or a type that is another's
        inner = [part for part in _parts(config) if isinstance(part, wanted)]
        config = inner[0] if inner else configuration(wanted.model_type, sizes)
    torch.manual_seed(0)
    with torch.device(device) if device == "meta" else contextlib.nullcontext():
        return made._from_config(config) if "_from_config" in dir(made) else made(config)


def is_here(name: str) -> bool:
    return inspect.isclass(getattr(transformers, name, None))
