"""`python -m fapm` is `fapm`."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - shipped to a cluster, it may meet any
    sys.exit(f"fapm: this is Python {sys.version_info[0]}.{sys.version_info[1]}; fapm needs 3.11 or newer")

from fapm.cluster.cli import main

main()
