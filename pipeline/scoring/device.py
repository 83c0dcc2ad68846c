"""Which device computes, and the engine for it. Engines are loaded when they are made: numba and torch take long."""

from __future__ import annotations

import glob
import sys
from collections.abc import Callable
from typing import Any

from fapm.errors import UserError
from fapm.scoring.engine import Engine
from fapm.scoring.methods import METHODS

KIND = "cuda"
"""Names in torch of the GPUs of NVIDIA, and of AMD. Others do not have float64 throughout."""


def make_engine(method: str, device: str) -> Engine:
    """The engine for `auto`, `cpu`, `cuda` or `cuda:N`; torch calls AMD's GPUs `cuda` too.

    Raises:
        UserError: a GPU was asked for that is not there, or torch is too old for it.
    """
    assert method in METHODS
    if not uses_gpu(device):
        from fapm.scoring.compiled import CpuEngine

        return CpuEngine(method)
    if not gpus():
        raise UserError(
            f"--device {device}: torch finds no GPU here, or is too old to use it; update torch or use --device cpu"
        )
    from fapm.scoring.accelerator import Accelerator
    from fapm.scoring.torch_engine import TorchEngine

    _, _, number = device.partition(":")
    if number and int(number) >= gpus():
        raise UserError(f"--device {device}: the last GPU here is {KIND}:{gpus() - 1}")
    return TorchEngine(method, Accelerator(KIND if device == "auto" else device))


def announce(say: Callable[[str], None]) -> Callable[[], None]:
    """Have `say` told if loops have to be compiled first, which every engine has some of; call what is returned to
    end it."""
    from fapm.scoring import compiled

    return compiled.announce(say)


def uses_gpu(device: str) -> bool:
    """Whether a GPU will compute."""
    return device != "cpu" and (device != "auto" or gpus() > 0)


_NODES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")  # NVIDIA's, AMD's, Windows'


def gpus() -> int:
    """How many GPUs this process may use: none, too, where torch is too old for them."""
    # Importing torch takes more than a second; without a driver's device nodes there is nothing to ask it.
    if not any(glob.glob(node) for node in _NODES):
        return 0
    import torch

    found: Any = getattr(torch, "accelerator", None)
    if not hasattr(found, "get_memory_info") or not hasattr(torch, "AcceleratorError") or not found.is_available():
        return 0
    return found.device_count() if found.current_accelerator().type == KIND else 0


def is_full(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left."""
    return _is(error, "OutOfMemoryError") or (_is(error, "AcceleratorError") and "out of memory" in str(error))


def has_failed(error: BaseException) -> bool:
    """Whether an error says that a device will not work again in this process."""
    return _is(error, "AcceleratorError") and not is_full(error)


def _is(error: BaseException, name: str) -> bool:
    kind = getattr(sys.modules.get("torch"), name, None)
    return kind is not None and isinstance(error, kind)
