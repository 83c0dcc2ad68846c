"""Folders that a stranger has laid out: as input, as output, as what a sweep has left.

Nothing outside of them is read into what is published, changed or removed; what is in the way is refused by its name.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import gaussian, save, save_pair, weights_of
from click.testing import CliRunner, Result

from fapm import UserError
from fapm.cluster.cli import cli
from fapm.layout import MANIFEST

SHAPES = {"model.layers.0.a.weight": (30, 40), "model.layers.1.a.weight": (8,)}
SECRET = "TOKEN=hunter2"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with base/ and finetuned/, in which commands run; elsewhere/ lies beside it and is the user's own."""
    save_pair(tmp_path / "here", SHAPES)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "key").write_text(SECRET)
    (tmp_path / "elsewhere" / "file").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def fapm(*words: str) -> Result:
    return CliRunner().invoke(cli, words, catch_exceptions=False)


def prune(*words: str) -> Result:
    return fapm("prune", "--base", "base", "--finetuned", "finetuned", "--out", "out", "--device", "cpu", *words)


def everything(folder: Path) -> dict[str, bytes | str]:
    """What lies in a folder: of a file what it says, of a link where it leads, of a folder nothing."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        found[str(path.relative_to(folder))] = (
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        )
    return found


def refused(done: Result, *words: str) -> None:
    """One line on stderr that says all of this."""
    assert done.exit_code == 1, done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("fapm: ") and all(word in line for word in words), line


def link(path: Path, to: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(to)


# What is read.

SIDE_FILES = (
    "README.md", "config.json", "tokenizer.json", "generation_config.json", "tokenizer.model", "chat_template.jinja",
    "model.safetensors", "model.safetensors.index.json", "modules.json", "LICENSE", "vocab.txt",
)  # fmt: skip


@pytest.mark.parametrize("to", ["/proc/self/environ", "../../elsewhere/key"])
@pytest.mark.parametrize("name", SIDE_FILES)
@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_a_file_of_an_input_that_is_a_link_is_refused(place, side, name, to, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    link(place / side / name, to)
    for command in ("plan", "prune"):
        done = fapm(command, "--base", "base", "--finetuned", "finetuned", "--out", "out", "--device", "cpu")
        refused(done, f"{side}/{name}", "link out of its folder")
    assert not any(SECRET.encode() in data for data in everything(place / "out").values() if isinstance(data, bytes))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "README.md"])
def test_a_file_of_an_adapter_that_is_a_link_is_refused(place, name):
    save(place / "adapter", {"base_model.model.model.layers.0.a.lora_A.weight": torch.ones(2, 40)})
    (place / "adapter" / "model.safetensors").rename(place / "adapter" / "adapter_model.safetensors")
    (place / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    link(place / "adapter" / name, "../../elsewhere/key")
    refused(prune("--finetuned", "adapter"), f"adapter/{name}", "link out of its folder")


@pytest.mark.parametrize("name", ["delta.json", "delta.safetensors", "README.md"])
def test_a_file_of_a_delta_that_is_a_link_is_refused(place, name):
    assert prune("--out", "delta", "--emit", "delta").exit_code == 0
    link(place / "delta" / name, "../../elsewhere/key")
    refused(
        fapm("apply", "--base", "base", "--delta", "delta", "--out", "out"), f"delta/{name}", "link out of its folder"
    )


def test_links_within_a_folder_and_within_the_hubs_cache_are_read(place):
    cache = place / "models--a--b"
    for side in ("base", "finetuned"):
        (cache / "blobs").mkdir(parents=True, exist_ok=True)
        snapshot = cache / "snapshots" / side
        snapshot.mkdir(parents=True)
        for path in (place / side).iterdir():
            path.rename(cache / "blobs" / f"{side}-{path.name}")
            link(snapshot / path.name, f"../../blobs/{side}-{path.name}")
    done = prune("--base", str(cache / "snapshots" / "base"), "--finetuned", str(cache / "snapshots" / "finetuned"))
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors"])
def test_a_pipe_is_no_file(place, name):
    """To open one would wait for ever."""
    (place / "finetuned" / name).unlink(missing_ok=True)
    os.mkfifo(place / "finetuned" / name)
    done = prune()
    assert done.exit_code == (1 if name == "model.safetensors" else 0)


# What is written and removed.

PLANTED = ("fapm", "fapm/tmp", "fapm/lock", "fapm/work", "fapm/log.jsonl", "fapm/run.json", "README.md", "config.json")
STATES: dict[str, Callable[[], object]] = {
    "empty": lambda: Path("out").mkdir(),
    "finished": lambda: prune(),
    "begun": lambda: (prune(), Path("out", MANIFEST).unlink(), Path("out/model.safetensors").unlink()),
    "of another": lambda: prune("--density", "0.3"),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", PLANTED)
def test_a_link_in_an_output_is_refused(place, name, state, overwrite):
    STATES[state]()
    path = place / "out" / name
    elsewhere = place.parent / "elsewhere"
    if path.is_dir():
        path.rename(place / "away")
    target = elsewhere if name in ("fapm", "fapm/tmp", "fapm/lock", "fapm/work") else elsewhere / "file"
    link(path, str(target))
    before = everything(place.parent)
    for command in ("plan", "prune"):
        words = ["--base", "base", "--finetuned", "finetuned", "--out", "out", "--device", "cpu"]
        refused(fapm(command, *words, *(["--overwrite"] if overwrite else [])), str(Path("out", name)), "is a link")
    assert everything(place.parent) == before


def test_links_below_folders_of_an_output_are_refused(place):
    link(place / "out" / "1_Dense", str(place.parent / "elsewhere"))
    refused(prune(), "out/1_Dense", "is a link")


@pytest.mark.parametrize("name", ["sweep", "sweep/fapm-0.1", "sweep/sweep.json", "sweep/evaluations"])
def test_a_link_in_a_sweeps_output_is_refused(place, name):
    elsewhere = place.parent / "elsewhere"
    link(place / "out" / name, str(elsewhere / "file" if name.endswith(".json") else elsewhere))
    before = everything(elsewhere)
    words = ["--base", "base", "--finetuned", "finetuned", "--out", "out", "--device", "cpu", "--density", "0.1,0.2"]
    refused(fapm("sweep", *words), str(Path("out", name)), "link")
    for command in ("report", "status", "verify"):
        assert fapm(command, "out").exit_code == 1
    assert everything(elsewhere) == before


@pytest.mark.parametrize("late", ["fapm", "fapm/tmp"])
def test_a_link_that_comes_while_a_run_is_at_work_is_not_followed(place, late):
    """Between the look and the writing."""
    from fapm.manifest import state
    from fapm.storage.lease import lease

    elsewhere = place.parent / "elsewhere"
    before = everything(elsewhere)
    with lease("out") as out:
        out.write("fapm/a", b"1")
        (place / "out" / late).rename(place / "away")
        link(place / "out" / late, str(elsewhere))
        for change in (
            lambda: out.write("fapm/b", b"2"),
            lambda: out.append("fapm/log.jsonl", b"{}"),
            lambda: out.remove("fapm/file"),
            lambda: state._clear(out),
        ):
            with contextlib.suppress(UserError):
                change()
        with pytest.raises(UserError, match="is a link"):
            out.write("fapm/c", b"3")
    assert everything(elsewhere) == before


def test_what_a_finished_folder_links_to_is_not_shown(place):
    prune()
    for name in ("fapm/manifest.json", "fapm/tensors.parquet", "fapm/log.jsonl", "config.json"):
        path = place / "out" / name
        kept = path.read_bytes()
        link(path, str(place.parent / "elsewhere" / "key"))
        for words in ("report out", "report out --html page.html", "status out", "verify out"):
            done = fapm(*words.split())
            assert SECRET not in done.output and "Traceback" not in done.output
        path.unlink()
        path.write_bytes(kept)
    assert fapm("verify", "out").exit_code == 0
    assert weights_of(place / "out")


# What is shown.

ESCAPE = "\x1b]0;owned\x07\x1b[31m\u202e\x9b2J"


def test_a_name_cannot_steer_a_terminal_or_a_page(place):
    odd = place / f"<img src=x onerror=alert(1)>{ESCAPE}`\n# mine"
    (place / "finetuned").rename(odd)
    done = prune("--finetuned", str(odd))
    assert done.exit_code == 0, done.output
    manifest = place / "out" / MANIFEST
    said = json.loads(manifest.read_text())
    said["oddities"] = [f"odd {ESCAPE}\nsecond line"]
    said["shards"][0]["name"] = f"model{ESCAPE}.safetensors"
    manifest.write_text(json.dumps(said))
    for words in (["report", "out"], ["report", "out", "--json"], ["verify", "out"], ["verify", "out", "--json"]):
        done = fapm(*words)
        shown = done.stdout + done.stderr
        assert not any(c in shown for c in "\x1b\x07\x9b\u202e"), shown
        assert "second line" not in [line.strip() for line in shown.splitlines()]
    card = (place / "out" / "README.md").read_text()
    assert "<img" not in card.replace("\\<img", "") or "`" in card
    (heading,) = [line for line in card.splitlines() if line.startswith("# ")]
    assert "<" not in heading.replace("\\<", "") and "\x1b" not in card


@pytest.mark.parametrize("option", ["--base", "--finetuned", "--out"])
def test_a_secret_in_an_address_is_not_repeated(place, option):
    done = prune(option, "s3://AKIAKEY:SEC/RET+x@bucket/folder")
    assert done.exit_code == 1
    assert "SEC/RET" not in done.output and "AKIAKEY" not in done.output and "bucket/folder" in done.output


def test_sides_with_gaussian_weights_are_not_the_same(place):
    """The pair that these tests prune has something to prune."""
    one, two = gaussian(SHAPES, torch.bfloat16)
    assert any(not torch.equal(one[name], two[name]) for name in one)
