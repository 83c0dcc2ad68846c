"""A sparse task vector as PEFT's SHiRA (arXiv 2406.13175), for the linear layers of a model that is loaded.

SHiRA adds differences, where a sparse task vector writes values: merged it gives the same weights as long as base +
(value − base), in the dtype of the model, is the value again. PEFT keeps no places in its files, only the seed of
random ones, so such an adapter is made where it is used and not saved.
"""

from __future__ import annotations

from typing import Any

import torch

from fapm.delta.model import patches
from fapm.errors import UserError


def as_shira(model: torch.nn.Module, delta: str) -> tuple[Any, list[str]]:
    """Wrap a model that holds base's weights; PEFT can switch the adapter on and off, merge and unmerge it.

    Args:
        delta: the folder of the sparse task vector, in any store.

    Returns:
        The `peft.PeftModel`, and the names of the tensors that SHiRA cannot carry, because they are not weights of
        linear layers.

    Raises:
        UserError: PEFT is missing, or a layer has changed in more places than SHiRA takes.
    """
    try:
        from peft import ShiraConfig, get_peft_model
    except ImportError:
        raise UserError("SHiRA is PEFT's: pip install peft") from None
    linear = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    changes: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    left_out: set[str] = set()
    for patch in patches(delta):
        if patch.name in linear:
            indices = torch.arange(patch.values.numel()) if patch.indices is None else patch.indices
            changes[patch.name] = indices, patch.values
        else:
            left_out.add(patch.name)
    if not changes:
        raise UserError(f"{delta}: no linear layer of the model has changed")
    rank = max(-(-found.numel() // sum(linear[name].weight.shape)) for name, (found, _) in changes.items())
    masks = {id(linear[name]): _mask(name, linear[name].weight, found, rank) for name, (found, _) in changes.items()}
    config = ShiraConfig(r=rank, target_modules=[name.removesuffix(".weight") for name in changes], init_weights=True)
    config.mask_fn = lambda layer, r, **_: masks[id(layer)]
    wrapped = get_peft_model(model, config)
    layers: dict[int, Any] = {id(m.base_layer): m for m in wrapped.modules() if hasattr(m, "shira_weight")}
    with torch.no_grad():
        for name, (indices, values) in changes.items():
            layer, weight = layers[id(linear[name])], linear[name].weight
            rows, columns = layer.shira_indices["default"].long()
            wanted = weight.reshape(-1).float().clone()
            wanted[indices.to(weight.device)] = values.to(weight.device).float()
            difference = (wanted.view_as(weight) - weight.float())[rows, columns]
            layer.shira_weight["default"].copy_(difference)
    return wrapped, sorted(left_out)


def _mask(name: str, weight: torch.Tensor, indices: torch.Tensor, rank: int) -> torch.Tensor:
    """Ones at as many places as SHiRA has weights for a layer: those that changed, and others that stay as they are."""
    wanted = rank * sum(weight.shape)
    if wanted > weight.numel():
        raise UserError(
            f"{name}: {indices.numel():,} of {weight.numel():,} elements have changed in a layer, and SHiRA of rank "
            f"{rank} would need more than all of them; use the sparse task vector itself"
        )
    mask = torch.zeros(weight.numel())
    mask[indices] = 1
    free = torch.nonzero(mask == 0).reshape(-1)[: wanted - indices.numel()]
    mask[free] = 1
    return mask.view(weight.shape).to(weight.device)
