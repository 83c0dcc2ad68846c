"""pytest tests/pipeline/test_hostile_outputs.py: finished folders, sweeps and deltas whose files say anything at all.

Whatever they say, every command ends with a line, in little time and memory. The fuzzer changes one part of what is
really there; for long with `FAPM_FUZZ=100000 pytest …/test_hostile_outputs.py -k fuzz`.
"""

from __future__ import annotations

import copy
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from checkpoints import save, save_pair
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pace import pace
from safetensors.torch import save_file

from fapm.cluster.cli import cli

SHAPES = {"model.layers.0.a.weight": (30, 40), "model.layers.1.a.weight": (30, 40), "b": (8,)}
FUZZ = int(os.environ.get("FAPM_FUZZ", "40"))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair, an output, a sweep, a delta, an adapter, and a run that was begun."""
    folder = tmp_path_factory.mktemp("found")
    save_pair(folder, SHAPES)
    sides = ["--base", str(folder / "base"), "--finetuned", str(folder / "finetuned"), "--device", "cpu"]
    score = 'sh -c \'echo {\\"new\\": 0.5, \\"old\\": 0.7}\' {checkpoint}'
    for words in (
        ["prune", *sides, "--out", str(folder / "out")],
        ["prune", *sides, "--out", str(folder / "delta"), "--emit", "delta"],
        ["sweep", *sides, "--out", str(folder / "swept"), "--density", "0.1,0.3", "--evaluate", score],
        ["merge", *sides[:4], "--finetuned", str(folder / "delta"), *sides[4:], "--out", str(folder / "merged")],
        ["prune", *sides, "--out", str(folder / "begun"), "--scope", "global", "--shard-size", "4KiB"],
    ):
        done = CliRunner().invoke(cli, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    (folder / "begun" / "fapm" / "manifest.json").unlink()
    (folder / "adapter").mkdir()
    tensors = {f"base_model.model.b.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save(folder / "base-of-adapter", {"b.weight": torch.ones(2, 2)})
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": {"b": 2}, "alpha_pattern": {"c": 1.5}}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture
def place(found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in which commands run. Its manifests name the inputs of the original."""
    shutil.copytree(found, tmp_path / "x")
    (tmp_path / "x" / "original").symlink_to(found)
    monkeypatch.chdir(tmp_path / "x")
    return tmp_path / "x"


OF_AN_OUTPUT = ("report out", "report out --json", "report out --html page.html", "status out", "verify out",
                "compare out delta")  # fmt: skip
OF_A_SWEEP = ("report swept", "report swept --html page.html")
SIDES = "--base original/base --finetuned original/finetuned --device cpu --out"
FILES: dict[str, tuple[str, ...]] = {
    "out/fapm/manifest.json": OF_AN_OUTPUT,
    "out/fapm/log.jsonl": ("status out",),
    "out/fapm/lock/000007": ("status out",),
    "out/config.json": ("verify out",),
    "swept/sweep/sweep.json": OF_A_SWEEP,
    "swept/sweep/evaluations/fapm-0.1.json": OF_A_SWEEP,
    "delta/delta.json": ("apply --base base --delta delta --out applied", "inspect delta", "verify delta"),
    "adapter/adapter_config.json": (
        "plan --base base-of-adapter --finetuned adapter --out pruned", "inspect adapter",
    ),
    "merged/fapm/manifest.json": tuple(f"{words} merged" for words in ("report --html page.html", "report", "verify")),
    "begun/fapm/run.json": (f"plan {SIDES} begun --scope global --shard-size 4KiB",),
}  # fmt: skip
"""Which commands read what."""


def ended(done: Any) -> None:
    """A result, or one line that says what is wrong; never a traceback, which `catch_exceptions` would have raised."""
    assert done.exit_code in (0, 1), done.output
    if done.exit_code:
        assert done.stderr.splitlines()[-1].startswith("fapm: ")
        assert len(done.stderr) < 20_000
    assert not any(letter in done.output for letter in "\x1b\x07\x9b\u202e")


def run(words: str) -> Any:
    done = CliRunner().invoke(cli, words.split(), catch_exceptions=False)
    ended(done)
    return done


# Anything at all in one place.

letters = st.text(max_size=12) | st.sampled_from(
    ["\x1b[2J\x07", "\u202e", "../../x", "/etc/passwd", "a" * 5000, "<b>", ""]
)
numbers = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([0, -1, 2**31, 2**63, 2**64, 1e308, 1e-320])
scalars = st.none() | st.booleans() | numbers | letters
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(letters, inner, max_size=3)
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a JSON value something stands."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*at, key))


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A value in which something is another thing, is missing, or is there under another name."""
    whole = [copy.deepcopy(value)]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(list(places(whole[0]))))
        holder: Any = whole
        for key in (0, *at)[:-1]:
            holder = holder[key]
        last = (0, *at)[-1]
        how = (
            draw(st.sampled_from(["other", "other", "other", "gone", "renamed"]))
            if isinstance(holder, dict)
            else "other"
        )
        if how == "other":
            holder[last] = draw(anything)
        elif how == "gone":
            del holder[last]
        else:
            holder[draw(letters)] = holder.pop(last)
    return whole[0]


LOCK = {"host": "there", "process": 1, "since": "now", "machine": "", "started": "", "token": "t"}
EVENT = {"time": "2026-01-01T00:00:00.000+00:00", "event": "shard", "where": "w", "read_bytes": 1, "progress_bytes": 2,
         "seconds": 1.0, "tries": 1, "reading": 0.1}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_fuzz_what_a_folder_says(place, name):
    path = place / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".jsonl"):
        kept = [json.loads(line) for line in path.read_text().splitlines()] + [EVENT]
    elif "lock" in name:
        kept = LOCK
    else:
        kept = json.loads(path.read_text())

    @settings(max_examples=FUZZ, deadline=None, suppress_health_check=list(HealthCheck))
    @given(value=changed(kept), command=st.sampled_from(FILES[name]))
    def fuzz(value: Any, command: str) -> None:
        lines = value if isinstance(value, list) and name.endswith(".jsonl") else [value]
        path.write_bytes("\n".join(json.dumps(line) for line in lines).encode("utf-8", "surrogatepass"))
        for made in ("applied", "pruned", "page.html"):
            shutil.rmtree(place / made, ignore_errors=True)
        run(command)

    fuzz()


def test_a_time_of_change_that_is_not_there(place):
    path = place / "begun/fapm/run.json"
    said = json.loads(path.read_text())
    for file in said["inputs"]["finetuned"].values():
        file["mtime_ns"] = None
    path.write_text(json.dumps(said))
    done = run(f"plan {SIDES} begun --scope global --shard-size 4KiB")
    assert "has changed since (it was written again)" in done.output


columns = st.sampled_from([
    pa.array([1, 2, 3]), pa.array(["a", "\x1b[2J", "c"]), pa.array([1.5, float("nan"), float("inf")]),
    pa.array([None, None, None], pa.int64()), pa.array([[1], [2, -3], []]), pa.array([b"a", b"b", b"c"]),
    pa.array([-1, 2**63 - 1, 0]), pa.array([{"a": 1}] * 3), pa.array(["model.layers.99999999999.x"] * 3),
])  # fmt: skip


def test_fuzz_tables(place):
    path = place / "out" / "fapm" / "tensors.parquet"
    table = pq.read_table(path, use_threads=False)

    @settings(max_examples=min(FUZZ, 1000), deadline=None, suppress_health_check=list(HealthCheck))
    @given(name=st.sampled_from(table.column_names), column=columns, how=st.sampled_from(["other", "gone", "cut"]),
           command=st.sampled_from(("report out", "report out --html page.html", "verify out")))  # fmt: skip
    def fuzz(name: str, column: pa.Array, how: str, command: str) -> None:
        i = table.column_names.index(name)
        made = table.remove_column(i) if how == "gone" else table.set_column(i, name, column)
        pq.write_table(made, path)
        if how == "cut":
            path.write_bytes(path.read_bytes()[: -1 - i])
        run(command)

    fuzz()


# In a second and in 200 MB.

BIG = 16 << 20
SCRAPS: dict[str, bytes] = {
    "lists": b"[" + b"[]," * (BIG // 3 - 2) + b"0]",
    "numbers": b'{"shards": [' + b"1000," * (BIG // 5 - 8) + b"0]}",
    "texts": b'{"oddities": [' + b'"ab",' * (BIG // 5 - 8) + b'""]}',
    "depth": b"[" * BIG,
    "a long text": b'{"fapm": "' + b"a" * (BIG - 20) + b'"}',
    "digits": b'{"format": ' + b"9" * (BIG - 20) + b"}",
    "lines": b"{}\n" * (BIG // 3),
    "zeros": bytes(64 << 20),
    "more than any": b" " * (300 << 20),
}


def rows(path: Path, count: int, **more: Any) -> None:
    """The table of a run with its one row many times."""
    one = pq.read_table(path, use_threads=False).slice(0, 1)
    pq.write_table(one.take(pa.array([0] * count, pa.int32())), path, **more)


def long_names(path: Path) -> None:
    """A name of 60 MB in each of many rows, of which the file has one."""
    table = pq.read_table(path, use_threads=False).slice(0, 1).take(pa.array([0] * 5000, pa.int32()))
    i = table.column_names.index("name")
    names = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), pa.array(["a" * (60 << 20)]))
    pq.write_table(table.set_column(i, "name", names), path, compression="zstd")


TABLES: dict[str, Callable[[Path], Any]] = {
    "of 3,000,000 rows": lambda path: rows(path, 3_000_000, compression="zstd"),
    "of names of 60 MB": long_names,
    "of nothing": lambda path: path.write_bytes(b""),
    "of zeros": lambda path: path.write_bytes(bytes(63 << 20)),
}

WATCHED = """
import os, resource, sys
def cost():
    of = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(o.ru_utime + o.ru_stime for o in of), max(o.ru_maxrss for o in of)
from fapm.cluster.cli import cli
try:
    cli(sys.argv[1:])
except SystemExit as ended:
    sys.stdout.flush()
    print(*cost(), ended.code, file=sys.stderr)
"""


def measured(words: str) -> tuple[float, int, int, list[str]]:
    """Seconds of processors and kilobytes of a command, its exit code, and what it said on stderr."""
    # A shell starts it: a process's peak is at least that of the one that has started it.
    command = ["sh", "-c", '"$@"; true', "sh", sys.executable, "-c", WATCHED, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    *said, last = done.stderr.splitlines()
    assert "Traceback" not in done.stderr, done.stderr
    seconds, kilobytes, code = last.split()
    return float(seconds), int(kilobytes), int(code), said


def refused_in_a_second_and_200_mb(words: str, usual: tuple[float, int, int, list[str]]) -> None:
    """Beside what the command takes where all is well."""
    seconds, kilobytes, code, said = measured(words)
    assert code == 1 and len(said) == 1 and said[0].startswith("fapm: ") and len(said[0]) < 5000, said
    assert seconds - usual[0] < pace(), words
    assert kilobytes - usual[1] < 200_000, words


@pytest.mark.parametrize("name", [name for name in FILES if not re.search("lock|evaluations|config.json", name)])
def test_what_is_too_much_is_refused_soon(place, name):
    command = FILES[name][0]
    usual = measured(command)
    assert usual[2] == 0, usual
    for scraps in SCRAPS.values():
        shutil.rmtree(place / "applied", ignore_errors=True)
        (place / name).write_bytes(scraps)
        refused_in_a_second_and_200_mb(command, usual)


@pytest.mark.parametrize("what", TABLES)
@pytest.mark.parametrize("command", ["report out", "report out --html page.html"])
def test_a_table_that_is_too_much_is_refused_soon(place, what, command):
    usual = measured(command)
    TABLES[what](place / "out" / "fapm" / "tensors.parquet")
    refused_in_a_second_and_200_mb(command, usual)


def test_children_are_counted():
    """What is measured above has children in it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    subprocess.run([sys.executable, "-c", "bytes(300 << 20).count(1)"], check=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >= max(before, 300 << 10)
