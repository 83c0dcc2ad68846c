"""pytest tests/pipeline/storage/test_mounts.py: mounts and accounts as they are: it works, or one line says why not."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from checkpoints import save_pair, weights_of
from faulty_files import NEEDS_FUSE, mounted

from fapm.storage import local

SHAPES = {"model.layers.0.a.weight": (60, 40), "model.layers.1.a.weight": (60, 40), "b": (8,)}


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    return save_pair(tmp_path, SHAPES)


def fapm(folder: Path, *words: str, before: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, "-m", "fapm", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def prune(folder: Path, out: str, *words: str) -> subprocess.CompletedProcess[str]:
    sides = ["--base", "base", "--finetuned", "finetuned", "--device", "cpu", "--shard-size", "6kB"]
    return fapm(folder, "prune", *sides, "--out", out, *words)


def same_as_here(folder: Path, out: Path) -> None:
    assert prune(folder, "here").returncode == 0
    assert weights_of(out) == weights_of(folder / "here")
    assert fapm(folder, "verify", str(out)).returncode == 0


WORKS = {
    "a share without fsync of folders": ("fsyncdir=EINVAL",),
    "one that does not support it": ("fsyncdir=ENOTSUP",),
    "one that has never heard of it": ("fsyncdir=ENOSYS",),
    "one that knows no sizes": ("statfs=0",),
    "one without hard links": ("link=EPERM",),
    "one that takes bytes in their order only": ("in-order=1",),
    "all of it": ("fsyncdir=EINVAL", "statfs=0", "link=EPERM", "in-order=1"),
}


@NEEDS_FUSE
@pytest.mark.parametrize("what", WORKS)
def test_what_a_mount_does_not_know_is_no_error(pair, what):
    with mounted(pair / "behind", pair / "mount", *WORKS[what]):
        done = prune(pair, "mount/out")
        assert done.returncode == 0, done.stderr
        same_as_here(pair, pair / "mount" / "out")


REFUSES = {
    "write=EDQUOT": 75, "write=ENOSPC": 75, "write=EIO": 75, "create=EACCES": 1, "create=EROFS": 1, "mkdir=EROFS": 1,
    "rename=ESTALE": 75, "fsync=EIO": 75, "getattr!=ESHUTDOWN": 75, "readdir!=EACCES": 1, "create=ENFILE": 75,
    "write=EAGAIN": 75, "rename=EIO": 75,
}  # fmt: skip


@NEEDS_FUSE
@pytest.mark.parametrize("what", REFUSES)
def test_what_a_mount_refuses_is_one_line(pair, what):
    with mounted(pair / "behind", pair / "mount", what):
        if "!" in what:
            assert prune(pair, "mount/out").returncode == 0
            (pair / "behind.now").touch()
        for words in (["--density", "0.2"], []):
            done = prune(pair, "mount/out", *words)
            assert done.returncode == REFUSES[what], (done.returncode, done.stderr)
            assert [line for line in done.stderr.splitlines() if line.startswith("fapm: ")], done.stderr


@NEEDS_FUSE
@pytest.mark.parametrize("role", ["base", "finetuned", "out"])
def test_a_mount_whose_server_has_died_may_pass(pair, role):
    with mounted(pair / "behind", pair / "mount") as server:
        if role != "out":
            (pair / role).rename(pair / "behind" / role)
            (pair / role).symlink_to(pair / "mount" / role)
        else:
            assert prune(pair, "mount/out").returncode == 0
        server.kill()
        server.wait()
        out = "mount/out" if role == "out" else "out"
        commands = [["plan", "--base", "base", "--finetuned", "finetuned", "--out", out]]
        commands += [["report", out], ["status", out], ["verify", out]] if role == "out" else [["inspect", role]]
        for words in commands:
            done = fapm(pair, *words)
            assert done.returncode == 75, (words, done.stderr)
            assert len(done.stderr.splitlines()) == 1 and "mount" in done.stderr + str(pair / role)


AS_OWNER = ["setpriv", "--inh-caps=-dac_override,-dac_read_search", "--bounding-set=-dac_override,-dac_read_search"]
"""Root without the right to pass over what a file's mode says."""
AS_STRANGER = [
    "setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", "--inh-caps=+dac_read_search",
    "--ambient-caps=+dac_read_search",
]  # fmt: skip
"""A user without an account, who can read this environment all the same."""
ONLY_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root can give up rights")


@ONLY_ROOT
@pytest.mark.parametrize(
    "what", ["base", "base/1_Dense", "base/model.safetensors", "base/config.json", "out", "out/fapm"]
)
def test_what_may_not_be_read_is_said_by_name(pair, what):
    (pair / "base" / "1_Dense").mkdir()
    (pair / "base" / "1_Dense" / "model.safetensors").write_bytes(b"")
    assert prune(pair, "out").returncode == 0
    sides = ["--base", "base", "--finetuned", "finetuned", "--device", "cpu", "--out"]
    commands = [["plan", *sides, "new"], ["prune", *sides, "new"], ["verify", "out"]]
    if what.startswith("out"):
        commands = [
            ["plan", *sides, "out"],
            ["prune", *sides, "out"],
            *([c, "out"] for c in ("report", "status", "verify")),
        ]
    (pair / what).chmod(0)
    try:
        for words in commands:
            done = fapm(pair, *words, before=AS_OWNER)
            assert done.returncode == 1, (words, done.stdout, done.stderr)
            assert len(done.stderr.splitlines()) == 1 and "ermission denied" in done.stderr, (words, done.stderr)
            assert what in done.stderr
    finally:
        (pair / what).chmod(0o755)


@ONLY_ROOT
def test_without_a_home_an_account_and_with_a_narrow_umask(pair, monkeypatch):
    for name in ("HOME", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    pair.chmod(0o777)
    before = ["sh", "-c", 'umask 077; exec "$@"', "sh", *AS_STRANGER]
    sides = ["--base", "base", "--finetuned", "finetuned", "--device", "cpu", "--out", "out"]
    done = fapm(pair, "prune", *sides, before=before)
    assert done.returncode == 0, done.stderr
    made = (pair / "out" / "model.safetensors").stat()
    assert (made.st_mode & 0o777, made.st_uid) == (0o600, 54321)


def test_an_error_that_may_pass_is_one_of_the_system_s():
    assert {errno.ENOTCONN, errno.ESTALE, errno.ESHUTDOWN, errno.EAGAIN, errno.ENFILE} <= local._PASSING
    assert not local._PASSING & {errno.EACCES, errno.EROFS, errno.ENOENT, errno.ENAMETOOLONG}
