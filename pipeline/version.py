"""The version of fapm that is installed, or was shipped."""

from __future__ import annotations

import functools
import importlib.metadata


@functools.cache
def version() -> str:
    """The installed version of fapm."""
    try:
        return importlib.metadata.version("fapm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
