"""Which device computes, and the engine for it. Engines are loaded when they are made: numba and torch take long."""

from __future__ import annotations

import glob
from collections.abc import Callable

from pipeline.errors import UserError
from pipeline.scoring.engine import Engine
from pipeline.scoring.methods import METHODS


def make_engine(method: str, device: str) -> Engine:
    """The engine for `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        UserError: a CUDA device was asked for and there is none.
    """
    assert method in METHODS
    if _on_cpu(device):
        from pipeline.scoring.compiled import CpuEngine

        return CpuEngine(method)
    from pipeline.scoring.accelerator import Accelerator
    from pipeline.scoring.torch_engine import TorchEngine

    if not _has_cuda():
        raise UserError(f"--device {device}: torch finds no CUDA device here; use --device cpu")
    return TorchEngine(method, Accelerator("cuda" if device == "auto" else device))


def announce(say: Callable[[str], None]) -> Callable[[], None]:
    """Have `say` told if loops have to be compiled first, which every engine has some of; call what is returned to
    end it."""
    from pipeline.scoring import compiled

    return compiled.announce(say)


def _on_cpu(device: str) -> bool:
    return device == "cpu" or (device == "auto" and not _has_cuda())


def _has_cuda() -> bool:
    # Importing torch takes more than a second; without a driver's device nodes there is nothing to ask it.
    if not glob.glob("/dev/nvidia[0-9]*") and not glob.glob("/dev/dxg"):
        return False
    import torch

    return torch.cuda.is_available()
