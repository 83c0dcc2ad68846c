"""An output on the Hugging Face Hub: put together in another folder, uploaded as it grows, and there with one commit.

The folder (`--staging`) is the run's state as any output folder is; what the Hub has of an upload that was cut short it
does not ask for again. Nothing of the repository changes before the commit, which is refused if somebody else's came
in between.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import queue
import shutil
import threading
from dataclasses import replace
from typing import Any

import numpy as np

from fapm import run
from fapm.errors import PassingError, UserError
from fapm.layout import LOG, MANIFEST, RECIPE, RUN
from fapm.manifest.state import differences, identity, shard_files
from fapm.planning.make import make_plan
from fapm.planning.plan import Plan
from fapm.recipe import Recipe, how
from fapm.run import MakePool, Result
from fapm.schedule import Watch
from fapm.schemas import ManifestRecord, RunRecord
from fapm.storage.address import is_repository, open_store, repository_of, split
from fapm.storage.records import checked
from fapm.storage.store import Store
from fapm.version import version


def prune_and_publish(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    pool: MakePool | None = None,
    watch: Watch | None = None,
    chosen: str = "",
) -> Result:
    """Prune, also into a repository of the Hub (`run.prune` knows folders).

    Raises:
        UserError: as there; the Hub does not let one write, or the repository has changed meanwhile.
        PassingError: the Hub does not answer; what is uploaded stays.
    """
    if not is_repository(recipe.out):
        return run.prune(recipe, overwrite=overwrite, pool=pool, watch=watch, chosen=chosen)
    from fapm.storage.hub import Target

    target, watch = Target(recipe.out, private=recipe.visibility == "private"), watch or Watch()
    plan = make_plan(recipe)
    if made := _made_before(target, plan):
        return Result(made, plan, len(plan.shards), True, 0.0)
    target.begin()
    staged = staged_recipe(recipe)
    ours = staged.out
    watch.say(f"note: the checkpoint is put together in {ours}, and uploaded from there")
    uploads = _Uploads(target, open_store(ours))

    def note(event: str, **facts: Any) -> None:
        if event == "shard":
            for name in shard_files(staged, facts["shard"]):
                uploads.add(name)
        watch.note(event, **facts)

    try:
        noted = replace(watch, note=note)
        result = run.prune(staged, overwrite=overwrite, pool=pool, watch=noted, chosen=chosen)
        for name in _stored(result.manifest):
            uploads.add(name)
        uploads.finish()
    finally:
        uploads.stop()
    watch.say(f"note: uploading to {recipe.out}")
    files = _to_publish(uploads.store, result.manifest, result.plan.recipe, recipe.out)
    _commit(target, plan, uploads, files)
    if not recipe.staging:
        shutil.rmtree(ours, ignore_errors=True)
    return replace(result, plan=plan)


def _made_before(target: Any, plan: Plan) -> dict[str, Any] | None:
    """The manifest of this very run, if the repository holds its output."""
    there = target.read(RUN, MANIFEST)
    try:
        same = not differences(checked(there[RUN], RunRecord, RUN), identity(plan))
        return checked(there[MANIFEST], ManifestRecord, MANIFEST) if same else None
    except (KeyError, UserError):
        return None


def staged_recipe(recipe: Recipe) -> Recipe:
    """The run that puts together what goes to the Hub; of another output the recipe itself."""
    if not is_repository(recipe.out):
        return recipe
    return recipe.model_copy(update={"out": recipe.staging or _own_staging(recipe)})


def _own_staging(recipe: Recipe) -> str:
    """A folder of this user's cache, the same for the same run."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    what = json.dumps([recipe.out, *recipe.checkpoints, recipe.decides()], sort_keys=True)
    return os.path.join(home, "fapm", "staging", hashlib.blake2b(what.encode(), digest_size=8).hexdigest())


def _to_publish(store: Store, made: dict[str, Any], recipe: Recipe, out: str) -> dict[str, bytes]:
    """Files beside the shards, with no path of this machine in them."""

    def public(path: str) -> str:
        return repository_of(path, pinned=True) or split(path)[1]

    paths = {role: public(path) for role, path in made["paths"].items()} | {"out": out}
    sources = [{**source, "path": public(source["path"])} for source in made.get("sources", ())]
    shown = recipe.with_paths(public).model_copy(update={"out": out, "staging": None})
    shards = set(_stored(made))
    found = {name: store.read(name) for name in store.files() if name not in shards and name != LOG}
    told = {**made, "paths": paths, "paths_given": paths, **({"sources": sources} if sources else {})}
    found[MANIFEST] = json.dumps(told, indent=1).encode()
    found[RECIPE] = shown.to_yaml().encode()
    return found


def _stored(made: dict[str, Any]) -> list[str]:
    """The files that hold weights."""
    records = [made["adapter"]] if made.get("adapter") else made["shards"]
    return [one["name"] for record in records for one in (record, record.get("delta")) if one]


def _commit(target: Any, plan: Plan, uploads: _Uploads, files: dict[str, bytes]) -> None:
    message = f"{how(plan.recipe.model_dump())} (fapm {version()})"
    try:
        target.commit(uploads.done, files, message)
    except PassingError:
        if not _made_before(target, plan):  # else only the answer was lost
            raise


class _Uploads:
    """Uploads of finished shards, one after the other, behind the run."""

    def __init__(self, target: Any, store: Store):
        self.store = store
        self.done: dict[str, Any] = {}
        self._target = target
        self._seen: set[str] = set()
        self._waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
        self._thread.start()

    def add(self, name: str) -> None:
        if name not in self._seen:
            self._seen.add(name)
            self._waiting.put(name)

    def finish(self) -> None:
        """Return when all is uploaded.

        Raises:
            UserError, PassingError: what went wrong.
        """
        self.stop()
        if self._error:
            raise self._error

    def stop(self) -> None:
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()

    def _work(self) -> None:
        while name := self._waiting.get():
            if self._error is None:
                try:
                    self.done[name] = self._target.upload(name, _source(self.store, name))
                except BaseException as error:  # raised by the thread that runs
                    self._error = error


def _source(store: Store, name: str) -> Any:
    """A file as huggingface_hub takes it: a path, or something to read from."""
    here = store.local_path
    return str(here / name) if here else io.BufferedReader(_Ranges(store, name), 8 << 20)


class _Ranges(io.RawIOBase):
    """A file in a store, as one to read from."""

    def __init__(self, store: Store, name: str):
        self._reader, self._at = store.reader(name), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._reader.size}[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        target = np.frombuffer(buffer, np.uint8)[: max(0, self._reader.size - self._at)]
        self._reader.read_into(self._at, target)
        self._at += target.size
        return int(target.size)
