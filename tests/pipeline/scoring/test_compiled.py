"""What numba keeps on disk stays what it was compiled from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import gaussian, save, weights_of

from fapm.scoring import compiled

SCRIPT = """
import sys
import numpy as np
from fapm.scoring.engine import Chunk
from fapm.scoring.compiled import CpuEngine

random = np.random.default_rng(0)
p = random.normal(0, 1, 5000).astype(np.float32)
f = p + random.normal(0, 0.1, 5000).astype(np.float32)
chunk = Chunk(np.array([0, 5000]), 0, np.array([1]), p, f, p.view(np.uint32), f.view(np.uint32))
m, threshold, zero = np.abs(p).mean().reshape(1), np.array([0.05], np.float32), np.zeros(1, np.int64)
for name in sys.argv[1:]:
    out = np.empty(5000, np.uint32)
    applied = CpuEngine(name).application(zero.copy())
    applied.add(chunk, m, threshold, zero, out)
    print(name, applied.result()[0].kept[0])
"""


def kept(cache: Path, *methods: str) -> dict[str, str]:
    """How many elements each method keeps, by loops that are compiled into `cache` or loaded from it."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", SCRIPT, *methods]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(line.split() for line in done.stdout.splitlines())


@pytest.mark.slow
def test_loops_that_several_processes_compiled_do_not_mix_in_one_that_loads_them(tmp_path: Path) -> None:
    methods = ("fapm", "magnitude", "random")
    fresh = kept(tmp_path / "together", *methods)
    assert len(set(fresh.values())) == len(methods)
    for name in methods:
        assert kept(tmp_path / "apart", name)[name] == fresh[name]
    assert kept(tmp_path / "apart", *methods) == fresh


PRUNE = [sys.executable, "-m", "fapm", "prune", "--base", "base", "--finetuned", "finetuned"]
REPOSITORY = Path(__file__).parents[3]


def on_read_only(folder: Path, out: str, *also: str) -> subprocess.CompletedProcess[str]:
    """Prune where the package, the home and the folders in `also` cannot be written, in mounts of its own."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    read_only = [str(REPOSITORY), str(home), *also]
    mounts = [f"mount --bind {folder} {folder}"]  # a mount of its own stays writable where one around it is not
    mounts += [f"mount --rbind {path} {path} && mount -o remount,bind,ro {path}" for path in read_only]
    command = " && ".join([*mounts, f"cd {folder}", f'exec "$@" --out {out}'])
    environment = {k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "TMPDIR")}
    environment |= {"HOME": str(home)}
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", command, "sh", *PRUNE],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture
def pair_of_folders(tmp_path: Path) -> Path:
    for role, tensors in zip(("base", "finetuned"), gaussian({"a": (300, 300), "b": (40,)}), strict=True):
        save(tmp_path / role, tensors)
    return tmp_path


@pytest.fixture
def without_temporary_cache() -> Iterator[None]:
    folder = Path(f"/tmp/fapm-compiled-{os.getuid()}")
    aside = folder.with_name(folder.name + "-aside")
    if folder.exists():
        folder.rename(aside)
    yield
    shutil.rmtree(folder, ignore_errors=True)
    if aside.exists():
        aside.rename(folder)


@pytest.mark.slow
def test_an_install_that_cannot_be_written_compiles_once(pair_of_folders: Path, without_temporary_cache: None) -> None:
    first = on_read_only(pair_of_folders, "one")
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("compiling the arithmetic for this machine") == 1
    assert f"kept in /tmp/fapm-compiled-{os.getuid()}" in first.stderr
    again = on_read_only(pair_of_folders, "two")
    assert again.returncode == 0, again.stderr
    assert "compiling" not in again.stderr


@pytest.mark.slow
def test_a_machine_on_which_nothing_can_be_written_but_the_output(
    pair_of_folders: Path, without_temporary_cache: None
) -> None:
    for out in ("one", "two"):
        done = on_read_only(pair_of_folders, out, "/tmp", "/var/tmp")
        assert done.returncode == 0, done.stderr
        assert "no folder can be written to keep it" in done.stderr
    assert weights_of(pair_of_folders / "one") == weights_of(pair_of_folders / "two")


def test_a_folder_that_others_may_write_to_keeps_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = compiled._private_folder()
    assert found
    assert Path(found).stat().st_mode & 0o777 == 0o700
    Path(found).chmod(0o770)
    assert compiled._private_folder() is None
    Path(found).rmdir()
    Path(found).symlink_to(tmp_path)
    assert compiled._private_folder() is None


@pytest.mark.slow
def test_a_disk_too_full_to_keep_what_was_compiled_is_no_error(pair_of_folders: Path) -> None:
    cache = pair_of_folders / "cache"
    cache.mkdir()
    command = f'mount -t tmpfs -o size=8k tmpfs {cache} && cd {pair_of_folders} && exec "$@" --out out'
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command, "sh", *PRUNE],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_what_is_compiled_is_kept_in_the_users_cache_and_not_beside_the_sources(pair_of_folders: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(pair_of_folders / "cache")}
    before = set(REPOSITORY.glob("pipeline/**/*.nb?"))
    for out, times in (("one", 1), ("two", 0)):
        command = [*PRUNE, "--out", out]
        done = subprocess.run(command, cwd=pair_of_folders, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("compiling") == times
    assert list((pair_of_folders / "cache" / "fapm" / "compiled").rglob("*.nbi"))
    assert set(REPOSITORY.glob("pipeline/**/*.nb?")) == before
