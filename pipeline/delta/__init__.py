"""The sparse task vector from Python."""

from fapm.delta.model import Patch, apply_, patches, revert_
from fapm.delta.shira import as_shira

__all__ = ["Patch", "apply_", "as_shira", "patches", "revert_"]
