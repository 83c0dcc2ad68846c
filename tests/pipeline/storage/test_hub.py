"""pytest tests/pipeline/storage/test_hub.py: inputs on the Hugging Face Hub, of which a small one is served here."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import hub as server
import pytest
import s3
import torch
from checkpoints import digests, gaussian, save
from huggingface_hub import snapshot_download
from pace import soon

from fapm import Recipe, UserError, prune
from fapm.checking.verify import verify
from fapm.errors import PassingError
from fapm.formats.checkpoint import open_checkpoint
from fapm.manifest.state import look
from fapm.publish import prune_and_publish as publish
from fapm.schedule import Watch
from fapm.storage import bucket
from fapm.storage.address import input_address, open_store, repository_of, split
from fapm.version import version

SHAPES = {"model.layers.0.a": (300, 400), "model.layers.0.norm": (64,), "model.layers.1.a": (512, 700)}


@pytest.fixture(scope="module")
def served() -> Iterator[server.Hub]:
    with server.served() as made:
        yield made


@pytest.fixture
def hub(served, tmp_path, monkeypatch, runner) -> server.Hub:
    """With two repositories, which are in the runner's folder too."""
    served.commits.clear()
    for names in (served.private, served.gated):
        names.clear()
    served.asked.clear()
    served.seen.clear()
    served.read = served.busy = 0
    server.use(monkeypatch, served.url, tmp_path / "home")
    runner.write(*gaussian(SHAPES, torch.bfloat16), shards=(1, 2))
    for side in ("base", "finetuned"):
        (runner.folder / side / "config.json").write_text(json.dumps({"model_type": "llama"}))
        served.push(f"org/{side}", runner.folder / side)
    monkeypatch.chdir(tmp_path)
    return served


def from_hub(runner, **choices) -> Recipe:
    sides = {"base": "org/base", "finetuned": "hf://org/finetuned"}
    return runner.recipe().model_copy(update=sides | choices)


def test_the_same_bytes_as_from_a_folder_and_nothing_is_downloaded_twice(hub, runner):
    expected, _ = runner.prune()
    result = prune(from_hub(runner))
    commits = {side: list(hub.commits[f"org/{side}"])[-1] for side in ("base", "finetuned")}
    out = result.plan.recipe.out
    paths = json.loads(Path(out, "fapm/manifest.json").read_text())
    assert paths["paths"]["base"] == f"hf://org/base@{commits['base']}"
    assert paths["paths"]["finetuned"] == f"hf://org/finetuned@{commits['finetuned']}"
    assert paths["paths_given"]["base"] == "org/base"
    weights = {name: digest for name, digest in digests(Path(out)).items() if name.endswith(".safetensors")}
    assert weights == {n: d for n, d in digests(expected).items() if n.endswith(".safetensors")}
    assert hub.read <= 1.02 * result.plan.pair_bytes + 20_000
    assert prune(from_hub(runner, out=out)).nothing_to_do
    assert verify(out) == []
    assert not Path("home/hub").exists()


def test_it_is_pinned_to_the_commit_that_the_revision_meant(hub, runner):
    first = input_address("org/finetuned")
    changed = runner.folder / "changed"
    shutil.copytree(runner.folder / "finetuned", changed)
    (changed / "config.json").write_text("{}")
    last = changed / "model-00002-of-00002.safetensors"
    last.write_bytes(last.read_bytes()[:-2] + b"\x12\x34")
    hub.push("org/finetuned", changed)
    assert open_store(first).read("config.json") == b'{"model_type": "llama"}'
    server.hub._look.cache_clear()
    second = input_address("org/finetuned")
    assert second != first
    assert open_store(second).read("config.json") == b"{}"
    assert input_address(f"hf://org/finetuned@{first.partition('@')[2]}") == first
    one = prune(from_hub(runner))
    assert one.plan.recipe.finetuned == second
    with pytest.raises(UserError, match=r"belongs to another run: finetuned: "):
        prune(from_hub(runner, finetuned=first, out=one.plan.recipe.out))


def test_a_folder_of_the_same_name_wins(hub, runner):
    shutil.copytree(runner.folder / "base", Path("org/base"))
    assert input_address("org/base") == "org/base"
    assert input_address("hf://org/base").startswith("hf://org/base@")
    with pytest.raises(UserError, match="there is no folder org/nothing"):  # there is a folder org
        open_checkpoint("org/nothing", "base")


def test_what_is_private_needs_the_token_which_the_cdn_never_sees(hub, runner, monkeypatch, tmp_path):
    hub.private |= {"org/base", "org/finetuned"}
    with pytest.raises(UserError, match=r"there is no hf://org/base on the Hub, or it is private: `hf auth login`"):
        look(from_hub(runner))
    server.use(monkeypatch, hub.url, tmp_path / "home", token=server.TOKEN)
    out = prune(from_hub(runner)).plan.recipe.out
    assert hub.seen and not any(hub.seen)
    left = b"".join(path.read_bytes() for path in Path(out).rglob("*") if path.is_file())
    assert server.TOKEN.encode() not in left


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("org/nothing", "there is no folder org/nothing; there is no hf://org/nothing on the Hub"),
        ("hf://org/base@nothing", "hf://org/base@nothing: the repository has no such revision"),
        ("hf://org", "give hf://ORGANISATION/NAME"),
        ("hf://org/base/file", "give hf://ORGANISATION/NAME"),
        ("hf://../..", "give hf://ORGANISATION/NAME"),
    ],
)
def test_what_is_not_there(hub, address, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        input_address(address)
    assert not isinstance(caught.value, PassingError)


def test_a_gated_repository_says_so(hub, runner):
    hub.gated.add("org/base")
    with pytest.raises(UserError, match="a gated repository wants its conditions accepted"):
        look(from_hub(runner))


def test_a_busy_hub_is_waited_for_within_bounds(hub, runner, monkeypatch):
    hub.busy = 3
    assert input_address("hf://org/base").startswith("hf://org/base@")
    hub.busy = 10**6
    server.hub._look.cache_clear()
    said = "there is no folder org/base; hf://org/base: the Hub answers 503"
    with soon(3), pytest.raises(UserError, match=said) as caught:
        input_address("org/base")  # perhaps a path that is misspelt: said at once, and final
    assert not isinstance(caught.value, PassingError)
    monkeypatch.setattr(server.hub, "_SECONDS", 1.0)
    hub.busy = 10**6
    server.hub._look.cache_clear()
    with soon(10), pytest.raises(PassingError, match="the Hub answers 503"):
        input_address("hf://org/base")


def test_files_in_the_local_cache_are_read_there(hub, runner, monkeypatch, tmp_path):
    for side in ("base", "finetuned"):
        snapshot_download(f"org/{side}")
    hub.read = 0
    prune(from_hub(runner))
    assert hub.read == 0
    server.use(monkeypatch, "http://127.0.0.1:9", tmp_path / "home", offline=True)
    asked = len(hub.asked)
    offline = prune(from_hub(runner))
    assert len(hub.asked) == asked
    assert offline.plan.recipe.base == f"hf://org/base@{list(hub.commits['org/base'])[-1]}"
    with pytest.raises(UserError, match=r"hf://org/nothing is not in the local cache, .*HF_HUB_OFFLINE"):
        input_address("hf://org/nothing")


def test_of_a_part_that_is_cached_the_rest_is_read_there(hub, runner):
    snapshot_download("org/finetuned", allow_patterns=["model-00001*"])
    (cached,) = Path("home/hub").rglob("snapshots/*/model-00001*")
    hub.read = 0
    result = prune(from_hub(runner))
    assert hub.read <= 1.02 * (result.plan.pair_bytes - cached.stat().st_size) + 20_000


# As output.


@pytest.fixture
def logged_in(hub, tmp_path, monkeypatch):
    server.use(monkeypatch, hub.url, tmp_path / "home", token=server.TOKEN)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for kept in (hub.uploaded, hub.messages):
        kept.clear()
    hub.blobs.clear()
    hub.deaf.clear()
    return hub


def to_hub(runner, **choices) -> Recipe:
    return from_hub(runner, out="hf://org/out", shard_size=300_000, **choices)


def newest(hub, name="org/out") -> dict[str, bytes]:
    return list(hub.commits[name].values())[-1]


def test_one_commit_private_with_card_and_no_path_of_this_machine(logged_in, runner, tmp_path):
    expected, _ = runner.prune(shard_size=300_000)
    said: list[str] = []
    result = publish(to_hub(runner), watch=Watch(say=said.append))
    files = newest(logged_in)
    weights = {path.name: path.read_bytes() for path in expected.glob("*.safetensors*")}
    assert len(weights) > 2
    assert {name: files[name] for name in weights} == weights
    assert "org/out" in logged_in.private
    assert logged_in.messages == [f"fapm, density 0.1, scope tensor (fapm {version()})"]
    assert files["README.md"].startswith(b"---\nbase_model:\n- org/base\n- org/finetuned\n")
    everything = b"".join(files.values())
    assert str(tmp_path).encode() not in everything and server.TOKEN.encode() not in everything
    assert b"hf://org/out" in files["fapm/manifest.json"]
    assert result.plan.recipe.out == "hf://org/out"
    assert not any((tmp_path / "cache/fapm/staging").iterdir())
    assert any("is put together in" in line for line in said)
    logged_in.asked.clear()
    assert publish(to_hub(runner)).nothing_to_do
    assert not any("commit" in path or "preupload" in path for path in logged_in.asked)
    assert verify("hf://org/out") == []


@pytest.mark.parametrize("emit", ["delta", "both"])
def test_a_sparse_task_vector_goes_there_and_comes_back(logged_in, runner, emit):
    expected, _ = runner.prune(shard_size=300_000)
    publish(to_hub(runner, emit=emit))
    files = newest(logged_in)
    commit = list(logged_in.commits["org/base"])[-1]
    assert json.loads(files["delta.json"])["base"]["address"] == f"hf://org/base@{commit}"
    weights = [name for name in files if name.endswith(".safetensors")]
    assert all(hashlib.sha256(files[name]).hexdigest() in logged_in.uploaded for name in weights)
    assert any(name.startswith("model") for name in weights) is (emit == "both")
    assert verify("hf://org/out") == []
    if emit == "delta":
        out = str(runner.folder / "again")
        sides = {"base": "org/base", "finetuned": "org/out", "out": out}
        prune(runner.recipe(rules=["*=finetuned"], shard_size=300_000).model_copy(update=sides))
        for path in expected.glob("*.safetensors*"):
            assert path.read_bytes() == (Path(out) / path.name).read_bytes()


def test_a_merge_and_an_adapter_have_no_path_of_this_machine(logged_in, runner, tmp_path):
    sources = [{"finetuned": "org/finetuned"}, {"finetuned": str(runner.folder / "finetuned"), "weight": 0.5}]
    choices = {"base": "org/base", "memory": "128MB", "shard_size": 300_000}
    publish(Recipe.of(**choices, merged=sources, out="hf://org/merged"))
    prune(Recipe.of(**choices, merged=sources, out=str(tmp_path / "merged")))
    for side, tensors in zip(
        ("base", "finetuned"), gaussian({"layers.0.q.weight": (64, 48)}, torch.bfloat16), strict=True
    ):
        logged_in.push(f"org/linear-{side}", save(tmp_path / f"linear-{side}", tensors))
    sides = {"base": "org/linear-base", "finetuned": "org/linear-finetuned"}
    publish(Recipe.of(**choices | sides, method="low-rank", rank=4, emit="adapter", out="hf://org/lora"))
    merged, lora = newest(logged_in, "org/merged"), newest(logged_in, "org/lora")
    for path in (tmp_path / "merged").glob("*.safetensors*"):
        assert merged[path.name] == path.read_bytes()
    commit = list(logged_in.commits["org/finetuned"])[-1]
    told = [source["path"] for source in json.loads(merged["fapm/manifest.json"])["sources"]]
    assert told == [f"hf://org/finetuned@{commit}", "finetuned"]
    assert {"adapter_model.safetensors", "adapter_config.json"} <= lora.keys() and "config.json" not in lora
    assert json.loads(lora["adapter_config.json"])["base_model_name_or_path"] == "org/linear-base"
    for files in (merged, lora):
        assert str(tmp_path).encode() not in b"".join(files.values())
    assert verify("hf://org/lora") == []


def test_what_is_uploaded_is_not_uploaded_again(logged_in, runner, monkeypatch):
    monkeypatch.setattr(bucket, "PATIENCE_SECONDS", 1.0)
    logged_in.deaf.add("/commit/")
    with pytest.raises(PassingError, match="the Hub answers 503"):
        publish(to_hub(runner))
    before = list(logged_in.uploaded)
    assert len(before) > 2 and list(newest(logged_in)) == [".gitattributes"]
    logged_in.deaf.clear()
    result = publish(to_hub(runner))
    assert logged_in.uploaded == before
    assert "fapm/manifest.json" in newest(logged_in)
    assert not result.plan.recipe.staging


def test_another_s_commit_in_between_is_not_written_over(logged_in, runner):
    logged_in.push("org/out", runner.folder / "base")
    said: list[str] = []

    def say(line: str) -> None:
        if line.startswith("model-00001"):
            logged_in.push("org/out", runner.folder / "finetuned")
        said.append(line)

    with pytest.raises(UserError, match="has got another commit since this run began"):
        publish(to_hub(runner), watch=Watch(say=say))
    publish(to_hub(runner))
    files = newest(logged_in)
    shards = {name for name in files if name.endswith(".safetensors")}
    index = json.loads(files["model.safetensors.index.json"])["weight_map"]
    assert shards == set(index.values())  # what the other one had is gone
    assert len(logged_in.messages) == 1


def test_staging_in_a_folder_that_was_named_stays(logged_in, runner, tmp_path):
    publish(to_hub(runner, staging=str(tmp_path / "stage"), visibility="public"))
    assert (tmp_path / "stage/fapm/manifest.json").exists()
    assert "org/out" not in logged_in.private


def test_from_a_bucket_in_which_it_is_put_together(logged_in, runner, monkeypatch):
    expected, _ = runner.prune(shard_size=300_000)
    with s3.moto() as endpoint:
        s3.use(monkeypatch, endpoint).create_bucket(Bucket="stage")
        publish(to_hub(runner, staging="s3://stage/out"))
        publish(to_hub(runner, staging="s3://stage/out"))
    s3.forget()
    files = newest(logged_in)
    assert all(files[path.name] == path.read_bytes() for path in expected.glob("*.safetensors"))
    assert len(logged_in.messages) == 1


def test_a_plan_for_the_hub(logged_in, runner):
    from click.testing import CliRunner

    from fapm.cluster.cli import cli

    shown = CliRunner().invoke(
        cli, ["plan", "--base", "org/base", "--finetuned", "org/finetuned", "--out", "hf://org/out"]
    )
    assert shown.exit_code == 0, shown.output
    assert "hf://org/out: fapm, density 0.1" in shown.stdout
    assert "all of it to upload" in shown.stdout
    assert "to download" in shown.stdout
    assert "org/out" not in logged_in.commits


def test_without_a_token_it_is_said_before_anything_is_done(hub, runner):
    with pytest.raises(UserError, match=r"hf://org/out: (the Hub denies access|nobody is logged in)"):
        publish(to_hub(runner))
    assert hub.read < 20_000


def test_names():
    assert repository_of("hf://org/name@abc") == "org/name"
    assert repository_of("hf://org/name@abc", pinned=True) == "hf://org/name@abc"
    assert repository_of("s3://org/name") == repository_of("org/name") == ""
    assert split("hf://org/name@abc") == ("hf://org", "name")


def test_bytes_that_break_off_are_asked_for_again(hub, runner, monkeypatch):
    from faulty import proxy

    expected = prune(from_hub(runner)).plan.recipe.out
    with proxy(hub.url) as between:
        monkeypatch.setattr(bucket, "PATIENCE_SECONDS", 30.0)
        hub.cdn = between.url
        between.disturb(1, 0.4, ("truncate", "reset", "503", "drop"))
        out = prune(from_hub(runner)).plan.recipe.out
    assert sum(between.met[fault] for fault in ("truncate", "reset", "503", "drop")) > 2
    assert digests(Path(out)) == digests(Path(expected))
