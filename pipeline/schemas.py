"""Models of the files of an output folder, against which they are checked before they are used."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AwareDatetime, ConfigDict, Field, TypeAdapter

from fapm.scoring.methods import METHODS
from fapm.storage.records import Checksum, Count, FileName, Integer, Name, Number, Record, Text

_Method = Annotated[str, Field(pattern=f"^({'|'.join(METHODS)})$")]
_Density = Annotated[float, Field(ge=0, le=1)]
_Seconds = Annotated[float, Field(ge=0, lt=1e10)]
_Candidate = Annotated[str, Field(pattern=r"^\w[\w.+-]{0,199}$")]


class Choices(Record):
    """Of a recipe, what is told of a run. All of it is checked by `Recipe` where it is used."""

    method: _Method
    density: _Density
    strength: Number = 1.0
    layer_scale: Text | None = None
    tail: _Density = 0.0
    rank: Count = 16
    scope: Name
    rules: list[Text]


class InputFile(Record):
    size: Count
    header: Text | None = None
    etag: Text | None = None
    mtime_ns: Integer | None = None
    ctime_ns: Integer | None = None
    inode: Integer | None = None


_Role = Annotated[str, Field(pattern=r"^(base|finetuned(-\d{1,5})?)$")]


class RunRecord(Record):
    """run.json: what makes a run this one."""

    format: Integer
    recipe: dict[Name, Any]
    inputs: dict[_Role, dict[Text, InputFile]]


class Paths(Record):
    base: Text
    finetuned: Text
    out: Text | None = None


class FileRecord(Record):
    name: FileName
    nbytes: Count
    xxh3_128: Checksum


class ShardRecord(FileRecord):
    """Record of a written shard; `delta` is its sparse task vector, where there is a shard beside it."""

    read_bytes: Count
    seconds: _Seconds
    delta: FileRecord | None = None
    library: Text | None = None


class Totals(Record):
    tensors: Count
    pruned_tensors: Count
    pruned_numel: Count
    kept: Count
    changed: Count
    kept_changed: Count
    density: Number | None
    effective_density: Number | None
    kept_share: Number | None
    read_bytes: Count
    written_bytes: Count
    elements: Count = 0
    delta_bytes: Count = 0
    weights: Count | None = None
    unpaired: Count | None = None
    density_of_all: Number | None = None
    rank: Count = 0
    full_rank: Count = 0
    shared: Count = 0
    opposed: Count = 0


class SourceRecord(Record):
    """What is said of a merge's source."""

    path: Text
    method: _Method
    density: _Density
    scope: Name
    seed: Count
    kept: Count
    pruned_numel: Count
    kept_share: Number | None


class Account(Record):
    counts: dict[Text, Count]
    left_out: dict[Name, Text]


class ManifestRecord(RunRecord):
    """manifest.json: what was done."""

    recipe: Choices  # type: ignore[assignment]
    paths: Paths
    finished: Text
    shards: list[ShardRecord]
    totals: Totals
    sources: list[SourceRecord] = Field(default_factory=list)
    adapter: FileRecord | None = None
    left_out: list[Name]
    added: list[Name]
    accounts: dict[Name, Account] = Field(default_factory=dict)
    oddities: list[Text]
    seconds: _Seconds
    resumed: Count
    workers: Count = 0
    lost_workers: dict[Text, Count] = Field(default_factory=dict)


class ThresholdsRecord(Record, strict=False):  # a tuple is a list in JSON
    """thresholds.json: of groups over several shards the key and the ties, and which shard hands out how many."""

    thresholds: dict[Name, tuple[Integer, Count]]
    quotas: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], dict[Name, Count]]
    rounds: Count


class MeasureRecord(Record):
    value: Number
    stderr: Number | None
    loss: Number | None = None


class PointRecord(Record):
    """Answer of an evaluation about a checkpoint."""

    new: MeasureRecord | None = None
    old: MeasureRecord | None = None
    retained: MeasureRecord | None = None
    forgetting: MeasureRecord | None = None
    error: Text = ""
    seconds: _Seconds = 0.0


class SideRecord(PointRecord):
    path: Text


class CandidateRecord(PointRecord):
    name: _Candidate
    out: Text
    method: _Method
    scope: Name
    density: _Density
    strength: Number = 1.0
    layer_scale: Text | None = None
    tail: _Density = 0.0
    rank: Count = 16
    decides: dict[Name, Any]
    kept: Count
    pruned_numel: Count
    kept_share: Number | None
    written_bytes: Count
    front: bool


class ChosenRecord(Record):
    name: _Candidate
    why: Text
    alike: list[_Candidate]
    how: Text = ""
    decides: dict[Name, Any]


class SweepRecord(Record):
    """sweep.json: what a sweep has come to."""

    base: SideRecord
    finetuned: SideRecord
    sources: list[SideRecord] = Field(default_factory=list)
    candidates: Annotated[list[CandidateRecord], Field(min_length=1, max_length=1000)]
    chosen: ChosenRecord | None
    command: list[Text] = Field(default_factory=list)


class EvaluationRecord(Record):
    """A file of evaluations/: what was said of one checkpoint, and what had been asked of which."""

    key: Name
    of: Text
    skills: dict[Annotated[str, Field(pattern="^(new|old)$")], MeasureRecord]
    error: Text
    seconds: _Seconds


class Event(Record, strict=False):  # a time is text in JSON
    """A line of the log."""

    time: AwareDatetime
    event: Name
    shards: Count = 0
    resumed: Count = 0
    bytes: Count = 0
    progress_bytes: Count = 0
    read_bytes: Count = 0
    tries: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    workers: Count = 0
    where: Text | None = None
    how: Text = ""
    error: Text = ""
    reading: _Seconds = 0.0
    computing: _Seconds = 0.0
    writing: _Seconds = 0.0


class Row(Record):
    """A row of the table, of one tensor."""

    name: Name
    action: Name
    dtype: Name
    shape: Annotated[list[Count], Field(max_length=64)]
    numel: Count
    shard: Name
    group: Name | None
    density: _Density | None
    k: Count | None
    pruned_numel: Count | None
    kept: Count | None
    changed: Count | None
    kept_changed: Count | None
    threshold_key: Integer | None
    ties: Count | None
    rank: Count | None = None
    full_rank: Count | None = None
    shared: Count | None = None
    opposed: Count | None = None
    threshold: Number | None
    mean_abs_base: Number | None
    norm_delta: Annotated[float, Field(ge=0, lt=1e150)] | None
    norm_base: Annotated[float, Field(ge=0, lt=1e150)] | None
    kept_share: Number | None


ROWS = TypeAdapter(list[Row], config=ConfigDict(defer_build=True))
