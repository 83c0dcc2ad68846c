"""pytest tests/pipeline/test_resume.py: whatever stops a run, the same command goes on and ends in the same bytes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import coarse, gaussian, load, save, weights_of

from fapm import UserError, prune
from fapm.checking.verify import verify
from fapm.errors import PassingError
from fapm.planning.make import make_plan
from fapm.pool import Threads
from fapm.run import in_process
from fapm.schedule import Watch
from fapm.shard.worker import Worker

SHAPES = {f"model.layers.{i}.{n}.weight": (60, 40) for i in range(3) for n in "ab"} | {"lm_head.weight": (50, 40)}
SHARDS = {"shard_size": "15kB"}  # one tensor and a half: every layer lies in two

DRIVER = '''
"""Runs prunes in forked children that kill themselves right before their n-th change of the disk.

Forked before any thread or arithmetic has begun: the parent only imports and compiles. Arguments: a JSON list of the
recipe, and of the numbers at which to die, tried one after the other in the same folder; 0 is to live.
"""
import itertools, json, os, signal, sys
import numpy as np
import pyarrow.parquet
from fapm import Recipe, prune
from fapm.scoring.engine import Chunk
from fapm.scoring.compiled import CpuEngine
from fapm.scoring.threshold import Bracket, histograms

CHANGES = ("replace", "unlink", "rmdir", "mkdir", "pwrite", "posix_fallocate", "fsync", "rename", "write")

def die_at(n):
    counter = itertools.count(1)
    def wrapped(real):
        def change(*args, **kwargs):
            if next(counter) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return change
    for name in CHANGES:
        setattr(os, name, wrapped(getattr(os, name)))

def run(recipe, n):
    child = os.fork()
    if child == 0:
        try:
            die_at(n)
            prune(Recipe.of(**recipe))
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return "killed" if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

x = np.ones(9, np.float32)
engine = CpuEngine("fapm")
one, zero = np.ones(1, np.int64), np.zeros(1, np.int64)
chunk = Chunk(np.array([0, 9]), 0, zero, x, x, x.view("u4"), x.view("u4"))
engine.sums().add(chunk)
engine.selection().add(chunk, np.float32(one), one)
engine.counting(histograms([Bracket()])).add(chunk, np.float32(one), zero)
engine.application(one).add(chunk, np.float32(one), np.float32(zero), zero, x.view("u4").copy())
for line in sys.stdin:
    recipe, n = json.loads(line)
    print(json.dumps(run(recipe, n)), flush=True)
'''


class Driver:
    def __init__(self):
        command = [sys.executable, "-c", DRIVER]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, recipe, die_at: int = 0):
        self._process.stdin.write(json.dumps([recipe.model_dump(mode="json", exclude_none=True), die_at]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def driver():
    started = Driver()
    yield started
    started.close()


def files_of(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*")}


def assert_not_taken_for_finished(out: Path, reference: Path) -> None:
    """What is under its final name is whole, and what makes a checkpoint of the folder comes after all of it."""
    done, expected = weights_of(out) if out.exists() else {}, weights_of(reference)
    for name, content in done.items():
        assert content == expected[name]
    complete = done == expected
    if (out / "config.json").exists() or (out / "fapm" / "manifest.json").exists():
        assert complete
    if (out / "model.safetensors.index.json").exists():
        assert complete


def kill_and_go_on(driver, runner, reference: Path, die_at: list[int], **choices) -> bool:
    """False if the run ended before it could be killed for the first time."""
    out = runner.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    recipe = runner.recipe("out", **choices)
    for i, n in enumerate(die_at):
        status = driver.run(recipe, n)
        if status != "killed":
            assert status == 0
            if i == 0:
                return False
        assert_not_taken_for_finished(out, reference)
    assert driver.run(recipe) == 0, die_at
    assert weights_of(out) == weights_of(reference), die_at
    assert files_of(out) == files_of(reference), die_at
    return True


@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
def test_killed_at_a_change_of_the_disk(driver, runner, scope):
    """At every 15th one: the slow test takes them all."""
    runner.write(*coarse(SHAPES))
    reference, _ = runner.prune(scope=scope, **SHARDS)
    n, random_ = 1, random.Random(scope)
    while kill_and_go_on(driver, runner, reference, [n], scope=scope, workers=2, **SHARDS):
        n += random_.randrange(1, 30)
    assert n > 30


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
def test_killed_at_every_change_of_the_disk(driver, runner, scope):
    runner.write(*coarse(SHAPES))
    shards = {"shard_size": "30kB"}
    reference, _ = runner.prune(scope=scope, **shards)
    n = 1
    while kill_and_go_on(driver, runner, reference, [n], scope=scope, workers=1, **shards):
        n += 1
    assert n > 50


@pytest.mark.slow
def test_killed_several_times_in_a_row(driver, runner):
    runner.write(*coarse(SHAPES))
    reference, _ = runner.prune(scope="global", **SHARDS)
    random_ = random.Random(0)
    for _ in range(15):
        die_at = [random_.randrange(1, 60) for _ in range(4)]
        assert kill_and_go_on(driver, runner, reference, die_at, scope="global", workers=2, **SHARDS)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
def test_killed_at_random_moments(runner, scope):
    shapes = {f"model.layers.{i}.{n}.weight": (1200, 1000) for i in range(6) for n in "ab"}
    runner.write(*gaussian(shapes, torch.bfloat16, delta=0.01))
    choices = {"scope": scope, "shard_size": "3MB", "workers": 2, "memory": "64MiB"}
    reference, _ = runner.prune(**choices)
    recipe = runner.recipe("out", **choices)
    command = [sys.executable, "-c", "import sys, json; from fapm import Recipe, prune; "
               "prune(Recipe.of(**json.loads(sys.argv[1])))", recipe.model_dump_json(exclude_none=True)]  # fmt: skip
    began = time.perf_counter()
    subprocess.run(command, check=True)
    whole = time.perf_counter() - began
    random_, killed = random.Random(scope), 0
    for _ in range(20):
        if killed > 3:
            break
        shutil.rmtree(recipe.out)
        while True:
            process = subprocess.Popen(command)
            try:
                assert process.wait(random_.uniform(0.2, 1) * whole) == 0
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed += 1
                assert_not_taken_for_finished(Path(recipe.out), reference)
        assert weights_of(Path(recipe.out)) == weights_of(reference)
    assert killed > 3


# Finished runs, other runs.


@pytest.fixture
def finished(runner):
    """A finished run over several shards, its recipe and its folder."""
    runner.write(*coarse(SHAPES))
    recipe = runner.recipe("out", scope="global", **SHARDS)
    prune(recipe)
    return runner, recipe, Path(recipe.out)


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(f): (f.stat().st_ino, f.stat().st_mtime_ns) for f in folder.rglob("*") if f.is_file()}


def test_a_finished_run_is_a_no_op(finished):
    _, recipe, out = finished
    before = stamps(out)
    result = prune(recipe)
    assert result.nothing_to_do
    assert stamps(out) == before
    assert prune(recipe.model_copy(update={"workers": 3, "memory": 2**27})).nothing_to_do


def test_what_is_missing_of_a_finished_run_is_made_again(finished):
    _, recipe, out = finished
    expected = weights_of(out)
    shard = sorted(out.glob("*.safetensors"))[2]
    shard.unlink()
    result = prune(recipe)
    assert not result.nothing_to_do
    assert weights_of(out) == expected
    os.truncate(shard, 100)
    prune(recipe)
    assert weights_of(out) == expected
    assert prune(recipe).nothing_to_do


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json"])
def test_an_index_or_a_config_that_is_missing_is_made_again(finished, name):
    """Without it no library can load what the manifest calls finished."""
    _, recipe, out = finished
    content = (out / name).read_bytes()
    (out / name).unlink()
    prune(recipe)
    assert (out / name).read_bytes() == content


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"density": 0.2}, "density was 0.1 and is 0.2"), ({"scope": "tensor"}, "scope was 'global' and is 'tensor'"),
        ({"method": "magnitude"}, "method was 'fapm' and is 'magnitude'"), ({"seed": 5}, "seed was 0 and is 5"),
        ({"rules": ("*=base",)}, "rules was"), ({"dtype": "bfloat16"}, "dtype was None and is 'bfloat16'"),
        ({"nonfinite": "base"}, "nonfinite was"), ({"shard_size": 20_000}, "shard_size was"),
    ],
)  # fmt: skip
def test_another_recipe_is_refused_and_says_what_differs(finished, change, what):
    _, recipe, out = finished
    before = stamps(out)
    with pytest.raises(UserError) as caught:
        prune(recipe.model_copy(update=change))
    assert what in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert stamps(out) == before
    (out / "fapm" / "manifest.json").unlink()  # an unfinished one is no other
    with pytest.raises(UserError, match="belongs to another run"):
        prune(recipe.model_copy(update=change))


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_changed_inputs_are_refused_and_named(finished, side):
    runner, recipe, out = finished
    before = stamps(out)
    path = runner.folder / side / "model.safetensors"
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    with pytest.raises(UserError, match=rf"{side}: model\.safetensors has changed since \(modified "):
        prune(recipe)
    tensors = load(runner.folder / side)
    tensors["more.weight"] = torch.ones(3)
    save(runner.folder / side, tensors)
    with pytest.raises(UserError, match=rf"{side}: model\.safetensors has changed since \(\d+ bytes then"):
        prune(recipe)
    save(runner.folder / side, tensors, 2)
    (runner.folder / side / "model.safetensors").unlink()
    with pytest.raises(UserError, match=rf"{side}: model-00001-of-00002\.safetensors is new"):
        prune(recipe)
    assert stamps(out) == before


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_inputs_changed_in_place_with_their_time_set_back_are_refused(runner, side, scope):
    """Between two tries: else shards of both would stand beside each other."""
    runner.write(*coarse(SHAPES))
    recipe = runner.recipe("out", scope=scope, **SHARDS)
    prune(recipe)
    (runner.folder / "out" / "fapm" / "manifest.json").unlink()
    path = runner.folder / side / "model.safetensors"
    change_in_place(path)
    with pytest.raises(UserError, match=rf"{side}: model\.safetensors has changed since"):
        prune(recipe)


def change_in_place(path: Path) -> None:
    """Other weights of the same size, at the same time."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(bytes(100))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_an_input_that_changes_while_it_is_read_is_refused(runner, side):
    runner.write(*coarse(SHAPES))
    path = runner.folder / side / "model.safetensors"
    with pytest.raises(UserError, match=f"{side}: .*has changed while it was read"):
        prune(runner.recipe("out", **SHARDS), watch=Watch(begin=lambda plan, nbytes: change_in_place(path)))
    assert not (runner.folder / "out" / "fapm" / "manifest.json").exists()


def test_a_group_that_keeps_another_number_is_refused(runner, monkeypatch):
    """Where no time of change tells: what was counted is held against what was written."""
    runner.write(*coarse(SHAPES))
    recipe = runner.recipe("out", scope="global", **SHARDS)
    path = runner.folder / "finetuned" / "model.safetensors"
    monkeypatch.setattr("fapm.manifest.finish.check_inputs", lambda plan: None)
    write, changed = Worker.write, []

    def late(self, task, following):
        if not changed:
            changed.append(change_in_place(path))
        return write(self, task, following)

    monkeypatch.setattr(Worker, "write", late)
    with pytest.raises(UserError, match="an input has changed between counting and writing"):
        prune(recipe)


def test_a_copy_on_another_disk_is_the_same_input(runner, small_disk):
    """A node that was lost comes back with another disk, and the inputs fetched again with their times."""
    runner.write(*coarse(SHAPES))
    prune(runner.recipe("out"))
    for side in ("base", "finetuned"):
        shutil.copytree(runner.folder / side, small_disk / side)
    moved = {side: str(small_disk / side) for side in ("base", "finetuned")}
    assert prune(runner.recipe("out").model_copy(update=moved)).nothing_to_do


def test_overwrite_starts_again(finished):
    runner, recipe, out = finished
    (out / "stale.safetensors").write_bytes(b"x")
    other = recipe.model_copy(update={"density": 0.5, "shard_size": 2**30})
    prune(other, overwrite=True)
    assert {f.name for f in out.glob("*.safetensors*")} == {"model.safetensors"}
    assert load(out).keys() == SHAPES.keys()
    fresh, _ = runner.prune(scope="global", density=0.5)
    assert weights_of(out) == weights_of(fresh)
    with pytest.raises(UserError, match="belongs to another run"):
        prune(recipe)


def test_a_folder_that_holds_something_else_is_refused(runner):
    runner.write(*coarse(SHAPES))
    out = runner.folder / "out"
    for name in ("notes.txt", "model.safetensors", "sub/x"):
        shutil.rmtree(out, ignore_errors=True)
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("mine")
        with pytest.raises(UserError, match="not empty and was not made by fapm"):
            runner.prune("out")
        assert (out / name).read_text() == "mine"
        assert files_of(out) == {name, *(str(p) for p in Path(name).parents if str(p) != ".")}
    shutil.rmtree(out)
    out.write_text("a file")
    with pytest.raises(UserError, match="is a file"):
        runner.prune("out")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_the_output_is_never_an_input(runner, side, overwrite):
    runner.write(*coarse(SHAPES))
    (runner.folder / "link").symlink_to(side)
    before = stamps(runner.folder)
    for name in (side, f"{side}/../{side}", "link"):
        recipe = runner.recipe(name)
        with pytest.raises(UserError, match=f"is the {side} checkpoint itself"):
            prune(recipe, overwrite=overwrite)
    assert stamps(runner.folder) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", ["fapm", "fapm/work", "fapm/tmp/deep"])
def test_inputs_below_the_output_are_never_removed(runner, where, overwrite):
    """Models kept in a folder that is itself called fapm: what a run clears there may be someone's weights."""
    base, finetuned = coarse(SHAPES)
    models = runner.folder / where
    save(models / "base", base)
    save(models / "finetuned", finetuned)
    recipe = runner.recipe(".").model_copy(
        update={"base": str(models / "base"), "finetuned": str(models / "finetuned")}
    )
    with contextlib.suppress(UserError):
        prune(recipe, overwrite=overwrite)
    assert load(models / "base").keys() == base.keys()
    assert load(models / "finetuned").keys() == finetuned.keys()


def test_an_output_of_before_inside_an_input_is_no_part_of_it(runner):
    """None can be made there any more; one that was is left alone, and changes nothing."""
    runner.write(*coarse(SHAPES))
    out, result = runner.prune("out")
    shutil.copytree(out, runner.folder / "finetuned/pruned")
    assert prune(result.plan.given).nothing_to_do
    again, _ = runner.prune("again")
    assert weights_of(again) == weights_of(out)
    with pytest.raises(UserError, match="lies in the finetuned checkpoint"):
        runner.prune("finetuned/pruned")


def test_a_damaged_state_is_one_error(finished):
    _, recipe, out = finished
    for content in ("", "{", "[]", "null", "{}", '{"inputs": 5}', '{"inputs": {"base": 5}}', '{"recipe": 5}'):
        (out / "fapm" / "run.json").write_text(content)
        with pytest.raises(UserError, match="--overwrite"):
            prune(recipe)


# Searching once.


class Counted(Threads):
    """The pool of this process that notes the steps it is asked for, and stops when told to."""

    def __init__(self, plan, out, watch, steps: list[str], stop_after: int | None = None):
        super().__init__(plan.recipe, out, 1, watch.advance)
        self._steps, self._stop_after = steps, stop_after

    def map(self, step, tasks):
        for done in super().map(step, tasks):
            self._steps.append(step.__name__)
            if self._stop_after is not None and len(self._steps) >= self._stop_after:
                raise KeyboardInterrupt
            yield done


def counted(recipe, stop_after: int | None = None) -> list[str]:
    steps: list[str] = []
    with contextlib.suppress(KeyboardInterrupt):
        prune(recipe, pool=lambda plan, out, watch: Counted(plan, out, watch, steps, stop_after))
    return steps


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_nothing_that_was_found_is_looked_for_again(runner, scope):
    runner.write(*coarse(SHAPES))
    reference, _ = runner.prune(scope=scope, **SHARDS)
    recipe = runner.recipe("whole", scope=scope, **SHARDS)
    whole = counted(recipe)
    shards = len(make_plan(recipe).shards)
    assert whole.count("write") == shards
    assert whole.count("sample") <= shards
    for stop in range(1, len(whole), 4):
        recipe = runner.recipe(scope=scope, **SHARDS)
        first = counted(recipe, stop)
        again = counted(recipe)
        assert first == whole[:stop]
        assert len(first) + len(again) <= len(whole) + 2  # what was under way when it stopped
        if "write" in first:
            assert set(again) <= {"write"}
        assert weights_of(Path(recipe.out)) == weights_of(reference)


def test_tensor_scope_writes_and_does_nothing_else(runner):
    runner.write(*coarse(SHAPES))
    assert set(counted(runner.recipe(**SHARDS))) == {"write"}


def test_a_shard_that_fails_leaves_the_others(runner, monkeypatch):
    runner.write(*coarse(SHAPES))
    recipe = runner.recipe("out", **SHARDS)
    write, last = Worker.write, make_plan(recipe).shards[-1].index

    def broken(self, task, following):
        if task.shard.index == last:
            raise UserError("this one fails")
        return write(self, task, following)

    monkeypatch.setattr(Worker, "write", broken)
    with pytest.raises(UserError, match="this one fails"):
        prune(recipe)
    monkeypatch.undo()
    assert len(list((runner.folder / "out").glob("*.safetensors"))) == last
    assert counted(recipe) == ["write"]


# A full disk.


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB; the output of SHAPES is 66 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for _ in range(50):  # the run takes room meanwhile
            stat = os.statvfs(disk)
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, max(1, stat.f_bavail * stat.f_frsize - leave))
                break
    return filler


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_disk_that_fills_up_is_one_error_and_the_run_goes_on_later(runner, small_disk, scope, after):
    runner.write(*coarse(SHAPES))
    reference, _ = runner.prune(scope=scope, **SHARDS)
    recipe = runner.recipe(scope=scope, **SHARDS).model_copy(update={"out": str(small_disk / "out")})
    written: list[str] = []

    def shard_done(line: str) -> None:
        written.append(line)
        if len(written) == after:
            fill(small_disk)

    begin = (lambda plan, nbytes: fill(small_disk) and None) if not after else (lambda plan, nbytes: None)
    with pytest.raises(UserError, match="no space left") as caught:
        prune(recipe, watch=Watch(begin=begin, say=shard_done))
    assert "same command" in str(caught.value)
    assert_not_taken_for_finished(small_disk / "out", reference)
    with pytest.raises(UserError, match=r"no space left|free"):
        prune(recipe)
    (small_disk / "filler").unlink()
    result = prune(recipe)
    assert result.resumed >= after
    assert weights_of(small_disk / "out") == weights_of(reference)
    assert files_of(small_disk / "out") == files_of(reference)


@pytest.mark.parametrize("emit", ["delta", "both"])
def test_a_disk_that_fills_up_under_a_sparse_task_vector(runner, small_disk, emit):
    """What is found of it is kept on that disk until the shard's end."""
    runner.write(*coarse(SHAPES))
    recipe = runner.recipe(emit=emit, density=1.0, **SHARDS).model_copy(update={"out": str(small_disk / "out")})
    with pytest.raises(PassingError, match="no space left"):
        prune(recipe, watch=Watch(begin=lambda plan, nbytes: fill(small_disk) and None))
    (small_disk / "filler").unlink()
    prune(recipe)
    assert verify(str(small_disk / "out")) == []


def test_a_disk_too_small_is_said_at_once(runner, small_disk):
    runner.write(*coarse(SHAPES))
    fill(small_disk, leave=40_000)
    recipe = runner.recipe().model_copy(update={"out": str(small_disk / "out")})
    with pytest.raises(UserError, match=r"needs 66.* kB and its disk has .* free"):
        prune(recipe)
    assert not (small_disk / "out").exists()


def test_what_a_killed_run_left_half_written_does_not_count_as_full(runner, small_disk):
    """A killed run's temporary shard is removed by the next one, which then has room."""
    runner.write(*coarse(SHAPES))
    recipe = runner.recipe(scope="tensor").model_copy(update={"out": str(small_disk / "out")})
    with pytest.raises(KeyboardInterrupt):
        prune(recipe, pool=lambda plan, out, watch: interrupted())
    left = small_disk / "out" / "fapm" / "tmp" / "model.safetensors.0123456789ab"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_bytes(bytes(200_000))
    fill(small_disk, leave=30_000)
    prune(recipe)
    assert load(small_disk / "out").keys() == SHAPES.keys()


def interrupted():
    raise KeyboardInterrupt


def test_overwrite_counts_the_room_of_what_it_replaces(runner, small_disk):
    runner.write(*coarse(SHAPES))
    recipe = runner.recipe().model_copy(update={"out": str(small_disk / "out")})
    prune(recipe)
    fill(small_disk, leave=30_000)
    prune(recipe.model_copy(update={"density": 0.2}), overwrite=True)
    assert load(small_disk / "out").keys() == SHAPES.keys()


def test_an_input_that_is_cut_short_meanwhile_is_one_error(runner):
    runner.write(*coarse(SHAPES))
    path = runner.folder / "finetuned" / "model.safetensors"

    def cut_short(plan, out, watch):
        os.truncate(path, 5000)
        return in_process(plan, out, watch)

    with pytest.raises(UserError, match="cut short while in use"):
        prune(runner.recipe("out"), pool=cut_short)
