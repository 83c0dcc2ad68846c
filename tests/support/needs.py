"""What a test needs beside Python packages: `tests/set_up.sh` brings it.

Without it the test is skipped with the reason; where CI is set it fails, for then the set-up has failed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = [str(room) for room in Path(__file__).parent.glob("**/")]
"""Of what tests share, for the path of other processes."""
DEBIAN = ROOT / ".venv" / "debian"
"""Debian packages unpacked, not installed."""
_BESIDE = (DEBIAN / "usr/bin", ROOT / ".venv/node/node_modules/.bin", ROOT / ".venv/bin")


def program(name: str) -> str | None:
    """Its path, installed or in .venv."""
    return shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *map(str, _BESIDE)]))


def needs(what: str, *programs: str, files: tuple[Path, ...] = ()) -> pytest.MarkDecorator:
    """Skip a test where a program or a file is missing."""
    missing = [name for name in programs if not program(name)] + [str(path) for path in files if not path.exists()]
    gone = bool(missing) and not os.environ.get("CI")
    return pytest.mark.skipif(gone, reason=f"{what} is not here ({', '.join(missing)}): tests/set_up.sh brings it")
