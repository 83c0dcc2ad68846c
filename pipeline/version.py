"""The version of fapm that is installed, or was shipped."""

from __future__ import annotations

import importlib.metadata


def version() -> str:
    """The installed version of fapm."""
    try:
        return importlib.metadata.version("fapm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
