"""Commands that are killed and given again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def killed_until_done(words: str, folder: Path, after: tuple[float, ...] = (0.8, 1.0, 1.2, 1.4)) -> None:
    """Give `fapm WORDS` in a folder, kill it after so many seconds, and so on; at last let it come to its end."""
    command = [sys.executable, "-m", "fapm", *words.split()]
    for seconds in after:
        try:  # a run that takes longer is killed when the time is up
            subprocess.run(command, cwd=folder, capture_output=True, timeout=seconds, check=True)
            return
        except subprocess.TimeoutExpired:
            pass
    subprocess.run(command, cwd=folder, capture_output=True, check=True)
