"""pytest tests/pipeline/storage/test_lease.py: one run at a time in a folder, and none that comes back from a pause."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from checkpoints import gaussian, weights_of
from pace import wait_until

from fapm.errors import PassingError
from fapm.layout import LOCKS, TEMPORARY
from fapm.storage import lease as holding
from fapm.storage.lease import lease


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(holding, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(holding, "LEASE_SECONDS", 2.0)


def someone_else(folder: Path, number: int = 1, **known) -> Path:
    """The lock of a run on another machine."""
    holder = {"host": "elsewhere", "process": 7, "since": "2026-01-01 00:00:00", "machine": "m", "started": "5"}
    path = folder / LOCKS / f"{number:06d}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**holder, "token": "theirs", **known}))
    (folder / TEMPORARY / "theirs").mkdir(parents=True, exist_ok=True)
    return path


def test_nothing_of_a_hold_is_left(tmp_path):
    with lease(str(tmp_path / "out")) as out:
        out.write("a", b"1")
        out.write("sub/b", b"2")
        out.remove("a")
        out.remove("not there")
    assert {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")} == {"sub", "sub/b"}


def test_a_second_run_is_told_who_holds_it(tmp_path):
    with lease(str(tmp_path)) as out:
        with pytest.raises(PassingError, match=rf"is being written by process {os.getpid()} on \S+ since 20"):
            lease(str(tmp_path)).__enter__()
        out.write("a", b"1")
    with lease(str(tmp_path)):
        pass


def test_a_run_on_another_machine_that_beats_is_left_alone(tmp_path):
    lock = someone_else(tmp_path)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.2):
            os.utime(lock)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(PassingError, match=r"process 7 on elsewhere since 2026-01-01"):
            lease(str(tmp_path)).__enter__()
    finally:
        ended.set()
        beating.join()
    assert lock.exists()
    assert [p.name for p in (tmp_path / TEMPORARY).iterdir()] == ["theirs"]


def test_one_that_is_silent_is_waited_for_and_taken_over(tmp_path):
    someone_else(tmp_path)
    (tmp_path / TEMPORARY / "theirs" / "half a shard").write_bytes(bytes(100))
    began, said = time.monotonic(), []
    with lease(str(tmp_path), said.append):
        assert time.monotonic() - began >= 2.0
        assert not (tmp_path / TEMPORARY / "theirs").exists()
        assert [p.name for p in (tmp_path / LOCKS).iterdir()] == ["000002"]
    assert "process 7 on elsewhere" in said[0]
    assert "waiting" in said[0]
    assert "taken over" in said[1]


def test_one_that_began_between_the_look_and_the_taking_is_no_predecessor(tmp_path, monkeypatch):
    """It was given a number that a finished run had left free."""
    first, make = someone_else(tmp_path), holding._make

    def make_after_another(folder, me, name):
        if json.loads(first.read_text())["process"] == 7:
            first.unlink()
            someone_else(tmp_path, process=8)
        return make(folder, me, name)

    monkeypatch.setattr(holding, "_make", make_after_another)
    said: list[str] = []
    with lease(str(tmp_path), said.append):
        pass
    taken_over = [line.split(" on ")[0] for line in said if "taken over" in line]
    assert [line.rpartition("process ")[2] for line in taken_over] == ["7", "8"]


def test_one_whose_process_is_gone_from_this_machine_is_taken_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(holding, "LEASE_SECONDS", 600)
    someone_else(tmp_path, process=os.getpid(), machine=holding._machine(), started="1")  # the number is used again
    said: list[str] = []
    with lease(str(tmp_path), said.append):
        pass
    assert len(said) == 1
    assert "gone" in said[0]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}'])
def test_a_lock_that_cannot_be_read_does_not_block_for_ever(tmp_path, content):
    someone_else(tmp_path).write_text(content)
    with lease(str(tmp_path)) as out:
        out.write("a", b"1")


def test_without_hard_links_too(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(95, "not supported")

    monkeypatch.setattr(os, "link", refuse)
    with lease(str(tmp_path)), pytest.raises(PassingError, match="is being written by process"):
        lease(str(tmp_path)).__enter__()
    with lease(str(tmp_path)):
        pass


CHANGES = {
    "write": lambda out, begun: out.write("new", b"x"),
    "create": lambda out, begun: out.create("new", 5),
    "publish": lambda out, begun: begun.publish(),
    "remove": lambda out, begun: out.remove("theirs"),
    "remove_folder": lambda out, begun: out.remove_folder("folder"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_that_comes_back_changes_nothing(tmp_path, monkeypatch, change):
    monkeypatch.setattr(holding, "_beat", lambda *_: None)  # paused from the beginning
    first = lease(str(tmp_path))
    out = first.__enter__()
    begun = out.create("theirs", 1)
    begun.write(0, b"o")
    with lease(str(tmp_path)) as successor:
        successor.write("theirs", b"n")
        successor.write("folder/theirs", b"n")
        with pytest.raises(PassingError, match="was taken over by another run or removed"):
            CHANGES[change](out, begun)
        first.__exit__(None, None, None)
        successor.write("more", b"n")
    found = {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"theirs": b"n", "folder/theirs": b"n", "more": b"n"}


RACE = """
import sys, time
from fapm.errors import PassingError
from fapm.storage import lease as holding
holding.BEAT_SECONDS, holding.LEASE_SECONDS = 0.1, 5
out, begin = sys.argv[1], float(sys.argv[2])
wins = 0
for i in range(15):
    time.sleep(max(0, begin + 0.2 * i - time.time()))
    try:
        with holding.lease(out) as folder:
            folder.write("winner", str(wins).encode())
            began = folder.read("winner")
            time.sleep(0.01)
            assert folder.read("winner") == began, "two at once"
            folder.remove("winner")
            wins += 1
    except PassingError as error:
        assert "is being written" in str(error), error
print(wins)
"""


@pytest.mark.slow
def test_of_many_at_once_one_wins(tmp_path):
    begin = str(time.time() + 2)
    racers = [
        subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path), begin], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    wins = [int(racer.communicate()[0]) for racer in racers]
    assert all(racer.returncode == 0 for racer in racers)
    assert sum(wins) >= 15
    assert list(tmp_path.iterdir()) == []


DRIVER = """
import json, sys
from fapm import Recipe, UserError, prune
from fapm.schedule import Watch
from fapm.storage import lease as holding
holding.BEAT_SECONDS, holding.LEASE_SECONDS = 0.3, 1.5
choices = json.loads(sys.argv[1])
try:
    prune(Recipe.of(**choices), overwrite=True, watch=Watch(say=lambda line: print(line, flush=True)))
except UserError as error:
    print(type(error).__name__, error, flush=True)
    sys.exit(75)
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_driver_paused_in_the_middle_cannot_spoil_its_successors_checkpoint(runner, after):
    """The successor even has another recipe, so that any byte of the first driver would be seen."""
    runner.write(*gaussian({f"model.layers.{i}.w": (400, 500) for i in range(8)}, torch.bfloat16))
    expected, _ = runner.prune(density=0.3, shard_size="450kB")

    def driver(density: float) -> subprocess.Popen[str]:
        recipe = runner.recipe("out", density=density, shard_size="450kB")
        command = [sys.executable, "-c", DRIVER, json.dumps(recipe.model_dump(mode="json", exclude_none=True))]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    first = driver(0.1)
    assert first.stdout
    if after:
        for line in first.stdout:
            after -= line.startswith("model-")
            if not after:
                break
    else:
        wait_until(lambda: [*(runner.folder / "out" / LOCKS).glob("0*")], pause=0.001)
    first.send_signal(signal.SIGSTOP)
    second = driver(0.3)
    said, _ = second.communicate()
    assert second.returncode == 0, said
    assert "taken over" in said
    first.send_signal(signal.SIGCONT)
    said, _ = first.communicate()
    assert first.returncode == 75, said
    assert "was taken over" in said
    assert weights_of(runner.folder / "out") == weights_of(expected)
    assert not any((runner.folder / "out" / name).exists() for name in (LOCKS, TEMPORARY, "fapm/work"))
