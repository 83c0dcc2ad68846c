"""A torch device, and the ways to it and back. What a device computes is asked for rarely: every answer is a wait."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


class Accelerator:
    """One device. Nothing here or behind it names a maker: torch's `cuda` is AMD's GPUs too."""

    def __init__(self, device: str):
        self.device = torch.device(device)

    def up(self, array: np.ndarray) -> torch.Tensor:
        """An array's elements on the device, unsigned ones as signed ones of the same bits."""
        return torch.from_numpy(_signed(array)).to(self.device)

    def down(self, tensor: torch.Tensor, target: np.ndarray) -> None:
        """Copy elements to the host, into an array of the same width."""
        torch.from_numpy(_signed(target)).copy_(tensor)

    def fetch(self, tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """Some int64 and float64 tensors on the host: one copy and one wait for all of them."""
        if not tensors:
            return []
        whole = torch.cat([tensor.reshape(-1).view(torch.int64) for tensor in tensors]).cpu().numpy()
        found, begin = [], 0
        for tensor in tensors:
            end = begin + tensor.numel()
            found.append(whole[begin:end].view("f8" if tensor.dtype == torch.float64 else "i8"))
            begin = end
        return found


def _signed(array: np.ndarray) -> np.ndarray:
    return array.view(f"i{array.itemsize}") if array.dtype.kind == "u" and array.itemsize > 1 else array
