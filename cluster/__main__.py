"""`python -m cluster` is `fapm`."""

from cluster.cli import main

main()
