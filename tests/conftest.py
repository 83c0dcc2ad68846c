"""What the tests share. Run them with `pytest` from the repository's root; `-m "not slow"` takes the quick ones."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # threads that wait for each other on cores that others use lose most of both
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else hundreds of processes compile all of fapm, each for itself

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_timeout
from checkpoints import Tensors, load, save
from pace import patience

from fapm import Recipe, prune
from fapm.run import Result

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as for what a script starts in the background, its children too
    signal.signal(signal.SIGINT, signal.default_int_handler)

NO_TOKEN = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": "/not/there"}
"""For Ray, which makes one in the home from 2.60 on, and uses it. Tests about tokens have their own."""
os.environ.update(NO_TOKEN)


class Runner:
    """Prunes pairs inside one temporary folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._runs = 0
        self._codes = False

    def write(self, base: Tensors, finetuned: Tensors, shards: tuple[int, int] = (1, 1)) -> None:
        self._codes = any(
            t.dtype.itemsize == 1 and t.is_floating_point() for t in (*base.values(), *finetuned.values())
        )
        save(self.folder / "base", base, shards[0])
        save(self.folder / "finetuned", finetuned, shards[1])

    def recipe(self, out: str | None = None, **choices: Any) -> Recipe:
        sides = {"base": str(self.folder / "base"), "finetuned": str(self.folder / "finetuned")}
        defaults = {"workers": 1, "device": "cpu", "memory": "128MB", **({"plain_codes": True} if self._codes else {})}
        return Recipe.of(**sides, out=str(self.folder / (out or self.new_name())), **{**defaults, **choices})

    def new_name(self) -> str:
        self._runs += 1
        return f"out-{self._runs}"

    def prune(self, out: str | None = None, **choices: Any) -> tuple[Path, Result]:
        recipe = self.recipe(out, **choices)
        result = prune(recipe)
        return Path(recipe.out), result

    def pruned(self, **choices: Any) -> Tensors:
        """Prune into a new folder and read what came out with the safetensors library."""
        return load(self.prune(**choices)[0])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `-n 2`: one cluster after the other in one process, and in the other the rest, a module's tests together."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            return "cluster" if "cluster/" in module or module.endswith("test_ceph.py") else module

    config.option.loadscopereorder = False  # the order is `pytest_collection_modifyitems`'
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest first, so that no process waits for another at the end."""
    items.sort(key=lambda item: ("cluster/" not in item.nodeid, "test_proof" not in item.nodeid))


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> Any:
    """A test's limit is in seconds of a quiet machine."""
    return pytest_timeout.pytest_timeout_set_timer(item, settings._replace(timeout=settings.timeout * patience()))


_status = [0]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    _status[0] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End without the libraries' own farewells: one process that has been the driver of many Ray clusters once died of
    a segmentation fault after its last test. How the program itself ends is tested on processes of its own."""
    if hasattr(config, "workerinput"):  # pytest-xdist ends its workers
        return
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_status[0])


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


@pytest.fixture
def new_runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Runner]]:
    """For tests that need several pairs, such as those of hypothesis."""
    made: list[Path] = []

    def new() -> Runner:
        made.append(tmp_path_factory.mktemp("pair"))
        return Runner(made[-1])

    yield new
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_token_of_this_machine() -> Iterator[None]:
    """What one test lets Ray know of tokens is not there for the next."""
    yield
    os.environ.update(NO_TOKEN)
