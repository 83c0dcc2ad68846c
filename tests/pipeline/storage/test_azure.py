"""pytest tests/pipeline/storage/test_azure.py: az:// on Azurite, Microsoft's emulator."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator

import azurite
import pytest
import torch
from checkpoints import gaussian
from needs import needs

from fapm import UserError, prune
from fapm.checking.verify import verify
from fapm.errors import PassingError
from fapm.storage.address import open_store
from fapm.storage.lease import lease

pytestmark = [pytest.mark.slow, needs("Azurite", "node", "azurite-blob")]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with azurite.served() as found:
        yield found


@pytest.fixture
def home(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"c{time.time_ns()}"
    azurite.make_container(endpoint, name)
    azurite.use(monkeypatch, endpoint)
    return f"az://{name}"


def test_files(home):
    folder = open_store(f"{home}/some/folder")
    assert not folder.exists()
    folder.write("a", b"123")
    assert (folder.read("a"), folder.reader("a").read(1, 2), list(folder.files())) == (b"123", b"23", ["a"])
    writer = folder.create("big", 20 << 20)
    writer.write(0, bytes(20 << 20))
    assert not folder.has("big")
    writer.publish()
    assert folder.size("big") == 20 << 20
    folder.remove_folder("")
    assert folder.is_empty()


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_the_same_bytes(home, runner, scope):
    shapes = {"model.layers.0.a": (300, 400), "model.layers.0.norm": (64,), "z": (70_001,)}
    runner.write(*gaussian(shapes, torch.bfloat16), shards=(2, 1))
    for side in ("base", "finetuned"):
        there = open_store(f"{home}/{side}")
        for path in (runner.folder / side).iterdir():
            there.write(path.name, path.read_bytes())
    expected, _ = runner.prune(scope=scope, shard_size="200kB")
    sides = {side: f"{home}/{side}" for side in ("base", "finetuned", "out")}
    one = runner.recipe(scope=scope, shard_size="200kB").model_copy(update=sides)
    prune(one)
    assert verify(one.out) == []
    assert prune(one).nothing_to_do
    out = open_store(one.out)
    assert all(out.read(path.name) == path.read_bytes() for path in expected.glob("*.safetensors"))


def test_one_at_a_time(home):
    with lease(f"{home}/out") as out:
        with pytest.raises(PassingError, match="is being written by process"):
            lease(f"{home}/out").__enter__()
        out.write("x", b"1")
    assert list(open_store(f"{home}/out").files()) == ["x"]


def test_what_is_wrong_is_said(home, endpoint, monkeypatch):
    with pytest.raises(UserError, match="az://nothing-there/x: there is no such container"):
        open_store("az://nothing-there/x").exists()
    azurite.use(monkeypatch, endpoint, key="no key")
    with pytest.raises(
        UserError, match=r"what the environment says of this store cannot be used: .*Invalid Access Key"
    ):
        open_store(f"{home}/x").exists()
    azurite.use(monkeypatch, endpoint, key=base64.b64encode(b"x" * 64).decode())
    with pytest.raises(UserError, match=r"the store denies access .* AZURE_STORAGE_ACCOUNT_NAME"):
        open_store(f"{home}/x").exists()
