"""An output that is an adapter: its two files, put together from what the workers have left."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import xxhash

from fapm.errors import UserError
from fapm.formats.adapter import CONFIG, WEIGHTS
from fapm.formats.checkpoint import architecture
from fapm.formats.header import build_header, read_header
from fapm.layout import WORK, factors_name
from fapm.planning.plan import Plan
from fapm.shard.factors import PREFIX
from fapm.storage.address import repository_of, split
from fapm.storage.store import Store

_COPIED = 8 << 20  # bytes at once


def write_adapter(plan: Plan, out: Store) -> dict[str, Any]:
    """Write the weights and the configuration of an adapter; returns the name, size and xxh3-128 of the weights.

    Raises:
        UserError: nothing is kept.
    """
    there = out.files(WORK)
    names = [factors_name(shard.index, i) for shard in plan.shards for i, _ in enumerate(shard.tensors)]
    names = [name for name in names if name in there]
    if not names:
        raise UserError(
            f"{plan.recipe.method} keeps no singular value of any matrix, so there is no adapter; ask for more"
        )
    found = [(name, info) for name in names for info in read_header(out.reader(name), name, name).tensors]
    header = build_header((info.name, info.dtype, info.shape, info.nbytes) for _, info in found)
    size = len(header) + sum(info.nbytes for _, info in found)
    writer, digest, offset = out.create(WEIGHTS, size), xxhash.xxh3_128(), 0

    def write(data: bytes) -> None:
        nonlocal offset
        digest.update(data)
        writer.write(offset, data)
        offset += len(data)

    try:
        write(header)
        for name, info in found:
            reader = out.reader(name)
            for at in range(0, info.nbytes, _COPIED):
                write(reader.read(info.offset + at, min(_COPIED, info.nbytes - at)))
        writer.publish()
    except BaseException:
        writer.discard()
        raise
    ranks = {info.name: info.shape[0] for _, info in found if info.name.endswith(".lora_A.weight")}
    modules = {name.removeprefix(PREFIX).removesuffix(".lora_A.weight"): rank for name, rank in ranks.items()}
    out.write(CONFIG, json.dumps(_configuration(plan, modules), indent=2).encode())
    return {"name": WEIGHTS, "nbytes": size, "xxh3_128": digest.hexdigest()}


def _configuration(plan: Plan, ranks: dict[str, int]) -> dict[str, Any]:
    """adapter_config.json: each module by its whole name, with a scale of 1."""
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    kind, address = architecture(plan.finetuned), plan.base.folder.absolute().address
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if kind.endswith("ForCausalLM") else None,
        # As of a card: no path of this machine.
        "base_model_name_or_path": repository_of(address) or split(address)[1],
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
