"""Every option of a prune that takes a value, with one that is not usual, and every flag that a recipe remembers."""

OPTIONS = {
    "method": "random", "density": "0.25", "strength": "2", "tail": "0.5", "rank": "9", "scope": "layer",
    "layer-scale": "0.5:1", "dtype": "bfloat16", "shard-size": "4kB", "memory": "200MB", "device": "cpu",
    "workers": "2-3", "seed": "7", "nonfinite": "base", "device-memory": "2GB", "staging": "st", "visibility": "public",
    "emit": "both", "delta-compression": "none", "on-conflict": "last", "unpaired": "pass", "cpus-per-worker": "2",
    "gpus-per-worker": "0.5", "accelerator": "A100", "label": "market-type=!spot",
}  # fmt: skip
FLAGS = ("--allow-pickle", "--allow-code", "--reversible", "--plain-codes", "--alone", "--allow-same")
WORDS = [word for name, value in OPTIONS.items() for word in (f"--{name}", value)] + [*FLAGS]
