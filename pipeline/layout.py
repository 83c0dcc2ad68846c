"""Layout of an output folder: the name of every file in it, once.

fapm/run.json            recipe and identity of the inputs; written first
fapm/log.jsonl           what happened, a JSON object a line
fapm/lock/N              leases; fapm/tmp/TOKEN: what their holders are writing
fapm/work/…              records of finished shards, counts, thresholds; removed at the end
model-….safetensors      each appears whole
model.safetensors.index.json, side files, fapm/recipe.yaml, fapm/tensors.parquet, config.json
adapter_model.safetensors, adapter_config.json: instead of shards, where the output is an adapter
fapm/source-N.parquet    of a merge, the table of its Nth source
fapm/manifest.json       written last: with it, and only with it, the run is finished
sweep/NAME/…             candidates of which the output was chosen
"""

RUN = "fapm/run.json"
LOG = "fapm/log.jsonl"
LOCKS = "fapm/lock"
"""Folder of the locks of the runs that want the output (`storage.lease`)."""
TEMPORARY = "fapm/tmp"
"""Folder of what is being written, by the token of its lease."""
WORK = "fapm/work"
MANIFEST = "fapm/manifest.json"
RECIPE = "fapm/recipe.yaml"
TABLE = "fapm/tensors.parquet"
INDEX = "model.safetensors.index.json"
SWEEP = "sweep"

ARRAYS = ".arrays"
"""End of the names of samples and counts."""


# Of a merge's sources each has files of its own, by its number; 0 is the run itself.


def _of(source: int) -> str:
    return f"-of-{source}" if source else ""


def is_of_first(name: str) -> bool:
    """Whether a file is of the run itself, or of its first source: what was read for it was read for all of them."""
    return _of(1) in name or "-of-" not in name


def sample_name(shard: int, source: int = 0) -> str:
    return f"{WORK}/sample-{shard:05d}{_of(source)}{ARRAYS}"


def measure_name(shard: int, round_: int, source: int = 0) -> str:
    return f"{WORK}/measure-{round_}-{shard:05d}{_of(source)}{ARRAYS}"


def thresholds_name(source: int = 0) -> str:
    return f"{WORK}/thresholds{_of(source)}.json"


def table_name(source: int = 0) -> str:
    return f"fapm/source-{source}.parquet" if source else TABLE


LIBRARY = f"{WORK}/library"
"""Name of the linear algebra with which the matrices of a run are worked on."""


def record_name(shard: int) -> str:
    return f"{WORK}/shard-{shard:05d}.json"


def rows_name(shard: int, source: int = 0) -> str:
    return f"{WORK}/shard-{shard:05d}{_of(source)}.rows"


def factors_name(shard: int, tensor: int) -> str:
    return f"{WORK}/factors-{shard:05d}-{tensor:05d}.safetensors"


def delta_facts_name(shard: int) -> str:
    return f"{WORK}/delta-{shard:05d}.json"
