"""A torch device: its memory, and the ways to it and back, which are streams of their own beside the arithmetic's.

Nothing here waits for the device but what says so. Whatever torch calls an accelerator will do that has float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch


class Put(NamedTuple):
    """Elements on their way to the device, and the event of their arrival."""

    tensor: torch.Tensor
    arrived: torch.Event | None


class Accelerator:
    """One device, for any number of threads.

    Args:
        device: as torch calls it; without a number the current one of its kind.
    """

    def __init__(self, device: str):
        wanted = torch.device(device)
        index = torch.accelerator.current_device_index() if wanted.index is None else wanted.index
        self.device = torch.device(wanted.type, index)
        self._up, self._down = torch.Stream(self.device), torch.Stream(self.device)

    @contextlib.contextmanager
    def _on(self, stream: torch.Stream) -> Iterator[None]:
        """Operations of this thread go to `stream`. (To enter the stream itself is for one thread at a time.)"""
        before = torch.accelerator.current_stream(self.device)
        torch.accelerator.set_stream(stream)
        try:
            yield
        finally:
            torch.accelerator.set_stream(before)

    def memory(self) -> tuple[int, int]:
        """Bytes that are free now, and all that there are."""
        free, total = torch.accelerator.get_memory_info(self.device)
        return free, total

    def host(self, nbytes: int) -> np.ndarray:
        """Host memory (uint8), page-locked, without which nothing is copied behind the arithmetic's back."""
        try:
            torch.accelerator.set_device_index(self.device.index)  # else another one is taken into use
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        except RuntimeError:  # more than may be locked: slower, and right
            return np.empty(nbytes, np.uint8)

    def up(self, array: np.ndarray) -> Put:
        """Begin to copy an array there, unsigned elements as signed ones of the same bits."""
        source = torch.from_numpy(_signed(array))
        with self._on(self._up):
            put = torch.empty(source.shape, dtype=source.dtype, device=self.device)
            put.copy_(source, non_blocking=True)
            return Put(put, self._up.record_event())

    def use(self, put: Put) -> torch.Tensor:
        """Arrays on the device, for operations of this thread: they wait until they have arrived."""
        stream = torch.accelerator.current_stream(self.device)
        if put.arrived is not None:
            stream.wait_event(put.arrived)
        put.tensor.record_stream(stream)  # its memory is not used again before they are done
        return put.tensor

    def sent(self) -> Callable[[], None]:
        """Waiter until all has been copied that was put there before this call: its source may be changed then."""
        return self._up.record_event().synchronize

    def down(self, tensor: torch.Tensor, target: np.ndarray) -> None:
        """Begin to copy elements, once they are computed, to an array of the same width in host memory."""
        computed = torch.accelerator.current_stream(self.device).record_event()
        self._down.wait_event(computed)
        tensor.record_stream(self._down)
        with self._on(self._down):
            torch.from_numpy(_signed(target)).copy_(tensor, non_blocking=True)

    def received(self) -> Callable[[], None]:
        """Waiter until all has come that was asked down before this call."""
        return self._down.record_event().synchronize

    def fetch(self, tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """Some int64 and float64 tensors on the host, flat: one copy and one wait for all of them."""
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
