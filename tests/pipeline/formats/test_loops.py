"""pytest tests/pipeline/formats/test_loops.py: the compiled loops of forms, against torch."""

from __future__ import annotations

import numpy as np
import torch

from fapm.formats.lowrank import rounded


def test_bfloat16_is_rounded_as_torch_rounds_it():
    """Every upper half of a float32, with lower halves around each tie; infinities, NaN and numbers near overflow."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    vals = (upper[:, None] | lower).reshape(-1).view(np.float32)
    theirs = torch.from_numpy(vals.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    found, nan = rounded(vals, "BF16"), np.isnan(vals)
    assert np.array_equal(found[~nan], theirs[~nan])
    assert np.isnan((found[nan].astype(np.uint32) << 16).view(np.float32)).all()  # torch has several
