"""The sparse task vector from Python."""

from pipeline.delta.model import Patch, apply_, patches

__all__ = ["Patch", "apply_", "patches"]
