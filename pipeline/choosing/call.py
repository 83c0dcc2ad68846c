"""Call a function of the user's with the path of a checkpoint, and print what it returns as JSON.

python -P call.py package.module:function PATH

A program of its own that knows nothing of the rest: the user's package may have any name.
"""

from __future__ import annotations

import importlib
import json
import os
import sys


def main() -> None:
    name, path = sys.argv[1:]
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    print(json.dumps(getattr(importlib.import_module(module), function)(path)))


if __name__ == "__main__":
    main()
