"""pytest tests/pipeline/storage/test_ceph.py: whole prunes in a production S3 server, Ceph's gateway."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import ceph
import pytest
import s3
import torch
from checkpoints import gaussian
from needs import needs
from pace import soon, wait_until

from fapm import Recipe, UserError, prune
from fapm.checking.verify import verify
from fapm.errors import PassingError
from fapm.recipe import command_words
from fapm.storage.address import open_store
from fapm.storage.lease import lease

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    needs("Ceph", *ceph.PROGRAMS),
]

SHAPES = {f"model.layers.{i}.w": (2048, 1024) for i in range(6)} | {"model.norm": (64,)}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with ceph.gateway() as found:
        yield found


@pytest.fixture
def client(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield s3.use(monkeypatch, endpoint, **ceph.KEYS, **s3.OLDER_SERVER)
    s3.forget()


@pytest.fixture
def home(client: Any, runner) -> str:
    runner.write(*gaussian(SHAPES, torch.bfloat16), shards=(2, 1))
    name = f"b-{time.time_ns()}"
    client.create_bucket(Bucket=name)
    for side in ("base", "finetuned"):
        s3.upload(client, runner.folder / side, f"s3://{name}/{side}")
    return f"s3://{name}"


def far(home: str, runner, **choices: Any) -> Recipe:
    here = runner.recipe(**choices)
    return here.model_copy(update={side: f"{home}/{side}" for side in ("base", "finetuned", "out")})


@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
def test_the_same_bytes(client, home, runner, scope):
    expected, _ = runner.prune(scope=scope, shard_size="10MB")
    one = far(home, runner, scope=scope, shard_size="10MB")
    prune(one)
    assert verify(one.out) == []
    found = s3.download(client, one.out)
    for path in expected.glob("*.safetensors"):
        assert found[path.name] == path.read_bytes()
    assert prune(one).nothing_to_do
    assert s3.uploads(client, home.removeprefix("s3://")) == []


def test_on_ray(client, home, runner):
    from fapm.cluster.pool import ray_pool

    expected, _ = runner.prune(scope="global", shard_size="10MB")
    one = far(home, runner, scope="global", shard_size="10MB", workers=2)
    prune(one, pool=ray_pool("local"))
    found = s3.download(client, one.out)
    assert all(found[path.name] == path.read_bytes() for path in expected.glob("*.safetensors"))


def test_killed_it_goes_on_and_leaves_no_part(client, home, runner):
    expected, _ = runner.prune(shard_size="10MB")
    one = far(home, runner, shard_size="10MB")
    command = [sys.executable, "-m", "fapm", *command_words(one), "--ray", "off"]
    for seconds in (0, 0.1, 0.2, 0.3, 0.4):
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = set(s3.names(client, one.out))
        wait_until(lambda p=running, b=before: p.poll() is not None or set(s3.names(client, one.out)) - b)
        time.sleep(seconds)
        running.send_signal(signal.SIGKILL)
        running.wait()
    prune(one)
    found = s3.download(client, one.out)
    assert all(found[path.name] == path.read_bytes() for path in expected.glob("*.safetensors"))
    assert s3.uploads(client, home.removeprefix("s3://")) == []


def test_one_at_a_time(client, home):
    with lease(f"{home}/out") as out:
        with pytest.raises(PassingError, match="is being written by process"):
            lease(f"{home}/out").__enter__()
        begun = out.create("a", 20 << 20)
        begun.write(0, bytes(20 << 20))
        out.end_uploads()
        with pytest.raises(UserError):
            begun.publish()
    assert s3.download(client, f"{home}/out") == {}


def test_a_wrong_key_is_said_at_once(client, home, monkeypatch, endpoint):
    s3.use(monkeypatch, endpoint, **{**ceph.KEYS, "AWS_SECRET_ACCESS_KEY": "wrong"}, **s3.OLDER_SERVER)
    with soon(4), pytest.raises(UserError, match="does not accept the secret key") as caught:
        open_store(f"{home}/base").exists()
    assert not isinstance(caught.value, PassingError)
