"""Checkpoints to be evaluated: where they are, and how each becomes a folder on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fapm import run
from fapm.planning.plan import Plan
from fapm.recipe import EVERYTHING, Recipe
from fapm.storage.address import HUB, absolute, is_repository, open_store, scheme_of, split
from fapm.storage.local import Folder


@dataclass(frozen=True)
class Source:
    """A checkpoint.

    Attributes:
        address: where it lies.
        identity: what distinguishes it from another one at that place.
        recipe: what makes it, if it is not whole where it lies: a sparse task vector, an adapter, codes.
    """

    name: str
    address: str
    identity: str
    recipe: Recipe | None = None


BASE, FINETUNED = "base", "finetuned"


def inputs(plan: Plan) -> list[Source]:
    """The checkpoints that a plan is about: base, finetuned, and of a merge finetuned-2 and so on."""
    base = Source(BASE, plan.base.folder.absolute().address, _digest(plan.base.identity))
    return [base, *(_finetuned(lane, base) for lane in plan.lanes or (plan,))]


def _finetuned(plan: Plan, base: Source) -> Source:
    side = plan.finetuned
    whole = None
    if any(info.form for info in side.tensors.values()):
        how = {"rules": EVERYTHING, "method": "fapm", "scope": "tensor", "emit": "checkpoint", "dtype": None}
        sides = {"base": base.address, "finetuned": absolute(plan.recipe.finetuned)}
        whole = plan.recipe.model_copy(update={**sides, **how})
    name = f"{FINETUNED}-{plan.source}" if plan.source > 1 else FINETUNED
    return Source(name, side.folder.absolute().address, _digest(side.identity), whole)


def _digest(what: Any) -> str:
    return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).hexdigest()


def output(name: str, address: str, manifest: dict[str, Any], recipe: Recipe) -> Source:
    """A finished output of fapm.

    Args:
        recipe: that made it.
    """
    digest = _digest([record["xxh3_128"] for record in manifest["shards"]])
    if recipe.emit not in ("delta", "adapter"):
        return Source(name, address, digest)
    whole = Recipe.of(
        base=absolute(recipe.base), finetuned=address, out=address, rules=EVERYTHING, allow_code=True,
        memory=recipe.memory, device=recipe.device, workers=recipe.workers, shard_size=recipe.shard_size,
    )  # fmt: skip
    return Source(name, address, digest, whole)


@contextlib.contextmanager
def at_hand(source: Source) -> Iterator[str]:
    """The path of a checkpoint on this machine, for as long as it is wanted; what had to be made for that is removed.

    Raises:
        UserError: it cannot be read, or there is no room for it.
    """
    if source.recipe is None and not scheme_of(source.address):
        yield source.address
        return
    if source.recipe is None and is_repository(source.address):
        from huggingface_hub import snapshot_download

        name, _, revision = source.address.removeprefix(f"{HUB}://").partition("@")
        yield snapshot_download(name, revision=revision or None)
        return
    with tempfile.TemporaryDirectory(prefix="fapm-") as folder:
        path = str(Path(folder, split(source.address)[1]))
        if source.recipe:
            run.prune(source.recipe.model_copy(update={"out": path}))
        else:
            _fetch(source.address, path)
        yield path


def _fetch(address: str, path: str) -> None:
    """Copy a checkpoint out of a store."""
    there, here = open_store(address), Folder(path)
    for name, stat in there.files().items():
        if "/" in name:
            continue
        writer, reader = here.create(name, stat.size), there.reader(name)
        try:
            for begin in range(0, stat.size, _PIECE):
                length = min(_PIECE, stat.size - begin)
                writer.write(begin, reader.read(begin, length))
            writer.publish()
        except BaseException:
            writer.discard()
            raise
    shutil.rmtree(Path(path, "fapm"), ignore_errors=True)


_PIECE = 16 << 20
