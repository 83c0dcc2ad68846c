"""The sparse task vector from Python."""

from pipeline.delta.model import Patch, apply_, patches, revert_
from pipeline.delta.shira import as_shira

__all__ = ["Patch", "apply_", "as_shira", "patches", "revert_"]
