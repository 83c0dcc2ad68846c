"""pytest tests/pipeline/storage/test_prune_in_buckets.py: whole prunes from and into an object store, moto's S3 server.

A proxy before it counts what passes, and in the slow tests breaks it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3
import torch
from checkpoints import gaussian, save
from faulty import Proxy, proxy
from safetensors.torch import save_file

from fapm import Recipe, UserError, prune
from fapm.checking.verify import verify
from fapm.choosing.candidates import candidates
from fapm.choosing.choice import Choice
from fapm.choosing.evaluation import evaluation
from fapm.choosing.sweep import evaluate_sweep, sweep, sweep_folder, take
from fapm.errors import PassingError
from fapm.reporting.status import status_facts
from fapm.storage import bucket
from fapm.storage import lease as holding

SHAPES = {
    "model.layers.0.a": (300, 400), "model.layers.0.norm": (64,), "model.layers.1.a": (512, 700), "z": (70_001,),
}  # fmt: skip


@pytest.fixture(scope="module")
def between() -> Iterator[Proxy]:
    with s3.moto() as endpoint, proxy(endpoint) as made:
        yield made


@pytest.fixture
def client(between: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    between.disturb(0, 0.0)
    yield s3.use(monkeypatch, between.url)
    s3.forget()


@pytest.fixture
def home(client: Any, runner) -> str:
    """A bucket with a pair in it, as it is in the runner's folder too."""
    name = f"b-{uuid.uuid4().hex}"
    client.create_bucket(Bucket=name)
    runner.write(*gaussian(SHAPES, torch.bfloat16), shards=(2, 1))
    for side in ("base", "finetuned"):
        s3.upload(client, runner.folder / side, f"s3://{name}/pair/{side}")
    return f"s3://{name}"


def recipe(home: str, runner, *far: str, **choices: Any) -> Recipe:
    """One whose base, finetuned or out lies in the bucket."""
    here = runner.recipe(**choices)
    addresses = {side: f"{home}/pair/{side}" for side in ("base", "finetuned")}
    addresses["out"] = f"{home}/{Path(here.out).name}"
    return here.model_copy(update={side: addresses[side] for side in far})


ALL = ("base", "finetuned", "out")
ROUNDS = int(os.environ.get("FAPM_ROUNDS", "10"))  # of runs that are broken or killed; 200 and 50 were done once


def contents(client: Any, out: str) -> dict[str, bytes]:
    """What makes the output a checkpoint."""
    found = s3.download(client, out) if out.startswith("s3:") else {
        str(path.relative_to(out)): path.read_bytes() for path in Path(out).rglob("*") if path.is_file()
    }  # fmt: skip
    return {name: data for name, data in found.items() if not name.startswith("fapm/")}


@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
@pytest.mark.parametrize("far", [ALL, ("base",), ("finetuned", "out"), ("out",)], ids="+".join)
def test_the_same_bytes_wherever_the_sides_lie(client, home, runner, scope, far):
    expected, _ = runner.prune(scope=scope, shard_size="400kB")
    mixed = recipe(home, runner, *far, scope=scope, shard_size="400kB")
    prune(mixed)
    assert contents(client, mixed.out) == contents(client, str(expected))
    assert verify(mixed.out) == []
    assert prune(mixed).nothing_to_do
    assert status_facts(mixed.out)["state"] == "finished"
    assert s3.uploads(client, home.removeprefix("s3://")) == []


def test_the_same_bytes_in_many_parts(client, home, runner):
    runner.write(*gaussian({"a": (9, 1 << 20), "b": (7, 1 << 20)}, torch.bfloat16), shards=(2, 1))
    expected, _ = runner.prune(shard_size="1GB", memory="64MiB")
    far = recipe(home, runner, "out", shard_size="1GB", memory="64MiB")
    prune(far)
    assert contents(client, far.out) == contents(client, str(expected))


@pytest.mark.parametrize(
    ("status", "code", "passes"),
    [(403, "QuotaExceeded", False), (501, "NotImplemented", False), (503, "SlowDown", True)],
)
def test_a_run_that_a_store_refuses_leaves_no_lock_and_no_parts(
    client, home, runner, between, monkeypatch, status, code, passes
):
    """The shards are refused, and nothing else; then the same command goes on."""
    far = recipe(home, runner, *ALL, shard_size="400kB")
    monkeypatch.setattr(bucket, "PATIENCE_SECONDS", 1.0)

    def refuses(asked: Any) -> tuple[int, str] | None:
        wanted = asked.command == "PUT" and ".safetensors" in asked.path and "/out" in asked.path
        return (status, f"<Error><Code>{code}</Code></Error>") if wanted else None

    monkeypatch.setattr(between, "refuses", refuses)
    with pytest.raises(UserError, match=code if passes else r"quota|kind of request") as caught:
        prune(far)
    assert isinstance(caught.value, PassingError) == passes
    monkeypatch.undo()
    s3.use(monkeypatch, between.url)
    there = s3.download(client, far.out)
    assert not [name for name in there if name.startswith(("fapm/lock", "fapm/tmp"))]
    assert s3.uploads(client, home.removeprefix("s3://")) == []
    prune(far)
    assert verify(far.out) == []


@pytest.mark.parametrize("emit", ["checkpoint", "delta"])
def test_a_sweep_into_a_bucket(client, home, runner, between, emit):
    far = recipe(home, runner, *ALL, shard_size="400kB")
    choices = far.model_dump() | {"density": "0.1,0.3", "emit": emit}
    between.reset()
    made = sweep(candidates(choices, sweep_folder(far)))
    files = [path for side in ("base", "finetuned") for path in (runner.folder / side).glob("*.safetensors")]
    size = sum(path.stat().st_size for path in files)
    assert made[0].manifest["totals"]["read_bytes"] <= size
    script = runner.folder / "score.py"
    script.write_text(
        "import glob, json, sys\nprint(json.dumps({'new': len(glob.glob(sys.argv[1] + '/*.safetensors')), 'old': 1}))\n"
    )
    command = f"{sys.executable} {script} {{checkpoint}}"
    found = evaluate_sweep(sweep_folder(far), made, evaluation([command], [], []))
    assert {name: said.skills["new"].value for name, said in found.said.items() if not said.error} == {
        "base": 2, "finetuned": 1, "fapm-0.1": len(made[0].plan.shards), "fapm-0.3": len(made[0].plan.shards),
    }  # fmt: skip
    take(found, Choice("fapm-0.3", "it was wanted"), far.out)
    expected, _ = runner.prune(density=0.3, shard_size="400kB")
    mine = {name: data for name, data in contents(client, far.out).items() if not name.startswith("sweep/")}
    assert {n: d for n, d in mine.items() if n != "README.md"} == {
        n: d for n, d in contents(client, str(expected)).items() if n != "README.md"
    }
    assert b"it was wanted" in mine["README.md"]
    assert verify(far.out) == []


def test_headers_are_all_that_a_plan_reads(client, home, runner, between):
    from fapm.manifest.state import look

    between.reset()
    plan, _ = look(recipe(home, runner, *ALL))
    files = [path for side in ("base", "finetuned") for path in (runner.folder / side).glob("*.safetensors")]
    headers = sum(int.from_bytes(path.read_bytes()[:8], "little") for path in files)
    assert between.read < 4 * headers + 40_000  # and listings
    assert plan.pair_bytes > 2e6


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_what_fits_in_memory_is_read_once(client, home, runner, between, scope):
    alone = {"workers": 1, "memory": "256MiB"}  # another would take what this one has in memory
    one = recipe(home, runner, "base", "finetuned", scope=scope, **alone, shard_size="100kB", density=0.3)
    between.reset()
    result = prune(one)
    pair, sampled = result.plan.pair_bytes, 0
    if scope == "global":  # of so small a model most
        events = [json.loads(line) for line in Path(one.out, "fapm/log.jsonl").read_text().splitlines()]
        sampled = sum(event["read_bytes"] for event in events if event["event"] == "sampled")
    assert pair <= between.read <= 1.02 * pair + sampled + 60_000


def test_a_changed_input_is_noticed(client, home, runner):
    one = recipe(home, runner, *ALL)
    prune(one)
    name = home.removeprefix("s3://")
    body = client.get_object(Bucket=name, Key="pair/finetuned/model.safetensors")["Body"].read()
    client.put_object(Bucket=name, Key="pair/finetuned/model.safetensors", Body=body[:-2] + b"\x12\x34")
    with pytest.raises(UserError, match=r"finetuned: model.safetensors has changed since \(it was written again\)"):
        prune(one)


def test_latest_and_the_date_in_a_bucket(client, home, runner):
    s3.upload(client, runner.folder / "finetuned", f"{home}/runs/checkpoint-9")
    s3.upload(client, runner.folder / "finetuned", f"{home}/runs/checkpoint-10")
    sides = {"base": f"{home}/pair/base", "finetuned": f"{home}/runs/latest", "out": f"{home}/pruned/{{date}}"}
    first = prune(Recipe.of(**sides, device="cpu"))
    assert first.plan.recipe.finetuned == f"{home}/runs/checkpoint-10"
    again = prune(Recipe.of(**sides, device="cpu"))
    assert again.nothing_to_do and again.plan.recipe.out == first.plan.recipe.out


def test_nothing_secret_is_left_anywhere(client, home, runner, capfd):
    one = recipe(home, runner, *ALL)
    prune(one)
    everything = b"".join(s3.download(client, one.out).values()) + "".join(capfd.readouterr()).encode()
    assert s3.KEYS["AWS_SECRET_ACCESS_KEY"].encode() not in everything
    assert b"Signature" not in everything and b"Credential" not in everything


def process(one: Recipe, **environment: str) -> subprocess.Popen[str]:
    from fapm.recipe import command_words

    command = [sys.executable, "-m", "fapm", *command_words(one), "--ray", "off"]
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_any_moment_it_goes_on_and_leaves_no_part_of_an_upload(client, home, runner, between):
    """Five times each."""
    name = home.removeprefix("s3://")
    for side in ("base", "finetuned"):
        shutil.rmtree(runner.folder / side)
    runner.write(*gaussian({f"layers.{i}.w": (4096, 1024) for i in range(4)}, torch.bfloat16))
    for side in ("base", "finetuned"):
        s3.upload(client, runner.folder / side, f"{home}/large/{side}")
    expected = contents(client, str(runner.prune(shard_size="18MB")[0]))
    sides = {side: f"{home}/large/{side}" for side in ("base", "finetuned")}
    dangling = 0
    for seed in range(ROUNDS):
        one = Recipe.of(**sides, out=f"{home}/killed-{seed // 5}", shard_size="18MB", device="cpu", workers=1)
        between.disturb(seed, 0.7, ("delay",))  # so that more uploads are under way
        running = process(one)
        next((line for line in running.stdout if line.startswith("pruning")), "")  # or it is finished
        until = time.monotonic() + random.Random(seed).uniform(0, 2.5)
        while time.monotonic() < until or (seed % 2 and running.poll() is None and not s3.uploads(client, name)):
            time.sleep(0.02)  # half of the kills wait for an upload
        running.send_signal(signal.SIGKILL)
        running.wait()
        between.disturb(0, 0.0)
        dangling += bool(s3.uploads(client, name))
        if seed % 5 == 4:
            prune(one)
            assert s3.uploads(client, name) == []
            assert contents(client, one.out) == expected
    assert dangling > ROUNDS // 20


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_whatever_the_network_does_the_bytes_are_right_or_it_is_said(client, home, runner, between, monkeypatch):
    """The patience is short, so that some give up."""
    monkeypatch.setattr(bucket, "PATIENCE_SECONDS", 0.6)
    monkeypatch.setattr(holding, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(holding, "LEASE_SECONDS", 1.0)  # of a run that could not say that it has ended
    retry: Any = {"max_retries": 2, "backoff": {"init_backoff": bucket.timedelta(milliseconds=10)}}
    monkeypatch.setattr(bucket, "RETRY", {**bucket.RETRY, **retry})
    expected = {
        scope: contents(client, str(runner.prune(scope=scope, shard_size="400kB")[0])) for scope in ("tensor", "global")
    }
    ended, said = {"done": 0, "gave up": 0}, set()
    for seed in range(ROUNDS):
        scope = "global" if seed % 20 == 0 else "tensor"
        one = recipe(home, runner, *ALL, scope=scope, shard_size="400kB")
        between.disturb(seed, (0.02, 0.1, 0.2, 0.9)[seed % 4])
        try:
            prune(one)
            ended["done"] += 1
        except PassingError as error:
            ended["gave up"] += 1
            said.add(str(error))
        between.disturb(0, 0.0)
        prune(one)
        assert contents(client, one.out) == expected[scope], seed
        assert s3.uploads(client, home.removeprefix("s3://")) == []
    assert min(ended.values()) > ROUNDS // 10, ended
    assert not any("\n" in line or "<" in line for line in said)
    assert all(between.met[fault] > ROUNDS // 3 for fault in ("drop", "lose", "truncate", "reset", "429", "503")), (
        between.met
    )


def test_an_adapter_in_a_bucket(client, home, runner):
    """Formed where it is read, from ranges of both sides."""
    name = "base_model.model.model.layers.1.a"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    base, _ = gaussian({"model.layers.1.a.weight": (512, 700), "z": (70_001,)}, torch.bfloat16)
    save(runner.folder / "plain", base)
    folder = runner.folder / "adapter"
    folder.mkdir()
    tensors = {f"{name}.lora_A.weight": torch.randn(2, 700), f"{name}.lora_B.weight": torch.randn(512, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for side in ("plain", "adapter"):
        s3.upload(client, runner.folder / side, f"{home}/with/{side}")
    outs = []
    for where in (str(runner.folder), f"{home}/with"):
        sides = {"base": f"{where}/plain", "finetuned": f"{where}/adapter", "out": f"{where}/out"}
        prune(runner.recipe(scope="global").model_copy(update=sides))
        assert verify(sides["out"]) == []
        outs.append(contents(client, sides["out"])["model.safetensors"])
    assert outs[0] == outs[1]


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_sparse_task_vector_in_a_bucket(client, home, runner, scope):
    expected, _ = runner.prune(scope=scope, shard_size="400kB")
    far = recipe(home, runner, *ALL, scope=scope, shard_size="400kB", emit="delta")
    prune(far)
    assert verify(far.out) == []
    assert not any(name.startswith("model") for name in s3.names(client, far.out))
    assert prune(far).nothing_to_do
    again = f"{home}/again"
    prune(far.model_copy(update={"finetuned": far.out, "out": again, "rules": ("*=finetuned",), "emit": "checkpoint"}))
    assert verify(again) == []
    found = contents(client, again)
    for name, data in contents(client, str(expected)).items():
        assert name == "README.md" or found[name] == data
    assert s3.uploads(client, home.removeprefix("s3://")) == []
