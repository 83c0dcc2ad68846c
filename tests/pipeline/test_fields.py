"""pytest tests/pipeline/test_fields.py: paths that hold the date, what was chosen, and the newest checkpoint."""

from __future__ import annotations

import datetime
import glob
import json
import os
from pathlib import Path

import pytest
import torch
from checkpoints import Tensors, digests, save

from fapm import Recipe, UserError, fields, prune
from fapm.checking.verify import verify
from fapm.formats.newest import newest
from fapm.run import Result


def weights(seed: int) -> Tensors:
    random = torch.Generator().manual_seed(seed)
    return {"model.layers.0.weight": torch.randn(40, 30, generator=random)}


class Runs:
    """A base and a folder of runs/, pruned by a recipe with fields."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder
        self._monkeypatch = monkeypatch
        save(folder / "base", weights(0))
        monkeypatch.chdir(folder)

    def add(self, name: str, seed: int, **how: int) -> Path:
        save(self.folder / "runs" / name, weights(seed), **how)
        return self.folder / "runs" / name

    def prune(self, day: int = 1, overwrite: bool = False, **choices: str) -> Result:
        with self._monkeypatch.context() as patch:
            patch.setattr(fields, "times", lambda: {"date": f"2026-12-{day:02d}", "time": "023005"})
            recipe = {"base": "base", "finetuned": "runs/latest", "out": "pruned/{date}", "device": "cpu", "workers": 1}
            return prune(Recipe.of(**recipe | choices), overwrite=overwrite)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tmp_path, monkeypatch)


def test_fields_stand_for_the_date_in_utc_and_what_was_chosen(runs):
    runs.add("chat-v2", 1)
    result = runs.prune(out="pruned/{finetuned}-on-{base}_{method}-{scope}-{density}_{date}T{time}", density="0.20")
    assert result.plan.recipe.out == "pruned/chat-v2-on-base_fapm-tensor-0.2_2026-12-01T023005"
    assert Path(result.plan.recipe.out, "fapm/manifest.json").exists()


def test_the_paths_that_were_found_and_those_given_stand_in_the_manifest(runs):
    runs.add("checkpoint-900", 1)
    manifest = runs.prune().manifest
    assert manifest["paths"] == {"base": "base", "finetuned": "runs/checkpoint-900", "out": "pruned/2026-12-01"}
    assert manifest["paths_given"] == {"base": "base", "finetuned": "runs/latest", "out": "pruned/{date}"}
    again = Recipe.load("pruned/2026-12-01/fapm/recipe.yaml")
    assert (again.finetuned, again.out) == tuple(map(os.path.abspath, ("runs/checkpoint-900", "pruned/2026-12-01")))


def test_the_same_inputs_on_another_day_are_not_pruned_again(runs):
    runs.add("checkpoint-900", 1)
    first = runs.prune(day=1)
    again = runs.prune(day=2)
    assert again.nothing_to_do
    assert again.plan.recipe.out == first.plan.recipe.out
    assert os.listdir("pruned") == ["2026-12-01"]


def test_new_inputs_are_pruned_to_a_folder_of_their_own(runs):
    runs.add("checkpoint-900", 1)
    runs.prune(day=1)
    runs.add("checkpoint-1000", 2)
    assert not runs.prune(day=2).nothing_to_do
    assert sorted(os.listdir("pruned")) == ["2026-12-01", "2026-12-02"]
    assert digests(Path("pruned/2026-12-01")) != digests(Path("pruned/2026-12-02"))


def test_another_recipe_is_another_run(runs):
    runs.add("checkpoint-900", 1)
    runs.prune(day=1)
    assert not runs.prune(day=2, density="0.3").nothing_to_do


def test_overwrite_begins_again_today(runs):
    runs.add("checkpoint-900", 1)
    runs.prune(day=1)
    assert not runs.prune(day=2, overwrite=True).nothing_to_do
    assert sorted(os.listdir("pruned")) == ["2026-12-01", "2026-12-02"]


def test_a_run_that_was_stopped_before_midnight_goes_on_in_its_folder(runs, monkeypatch):
    runs.add("checkpoint-900", 1)
    save(Path("base"), {f"{i}.weight": torch.randn(30, 30) for i in range(4)})
    save(Path("runs/checkpoint-900"), {f"{i}.weight": torch.randn(30, 30) for i in range(4)})
    with monkeypatch.context() as patch:
        patch.setattr("fapm.run.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            runs.prune(day=1, shard_size="4kB")
    result = runs.prune(day=2, shard_size="4kB")
    assert result.resumed == 4
    assert os.listdir("pruned") == ["2026-12-01"]


def test_other_things_that_lie_where_the_pattern_matches_are_left_alone(runs):
    runs.add("checkpoint-900", 1)
    for name, text in (("a", "{"), ("b", "[]"), ("c", "{}"), ("d", '{"inputs": 3}')):
        Path("pruned", name, "fapm").mkdir(parents=True)
        Path("pruned", name, "fapm/run.json").write_text(text)
    assert runs.prune().plan.recipe.out == "pruned/2026-12-01"
    assert Path("pruned/b/fapm/run.json").read_text() == "[]"


def test_braces_can_be_written_and_the_result_verified(runs):
    runs.add("checkpoint-900", 1)
    result = runs.prune(out="pruned/{{x}}-{date}")
    assert result.plan.recipe.out == "pruned/{x}-2026-12-01"
    assert verify(result.plan.recipe.out) == []
    assert Recipe.load("pruned/{x}-2026-12-01/fapm/recipe.yaml").out == os.path.abspath("pruned/{{x}}-2026-12-01")
    assert runs.prune(day=2, out="pruned/{{x}}-{date}").nothing_to_do


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("out/{day}", "there is no field {day}; it may hold {date}, {time}, {base}"),
        ("out/{date:%Y}", "there is no field {date:%Y}"),
        ("out/{date.year}", "there is no field {date.year}"),
        ("out/{}", "there is no field {}"),
        ("out/{date", "a brace stands alone"),
        ("out}", "a brace stands alone"),
    ],
)
def test_a_path_that_cannot_be_filled_is_refused(path, why):
    with pytest.raises(UserError, match="--out: ") as refused:
        Recipe.of(base="b", finetuned="f", out=path)
    assert why in str(refused.value)


def test_inputs_know_the_date_only():
    with pytest.raises(UserError, match=r"--finetuned: there is no field \{method\}; it may hold \{date\}, \{time\}"):
        Recipe.of(base="b", finetuned="{method}", out="o")


def test_times_are_utc():
    before = datetime.datetime.now(datetime.UTC)
    stamp = "{date} {time}".format(**fields.times())
    assert 0 <= (datetime.datetime.fromisoformat(stamp + "+00:00") - before).total_seconds() + 1 < 60


@pytest.mark.parametrize("name", ["plain", "a*b?[c]", "{date}", "{{date}}", "{{", "x{time}y{{z}}"])
def test_the_pattern_of_a_path_matches_what_it_reads_as(name, tmp_path):
    values = {"date": "2026-12-01", "time": "023005"}
    path = f"{fields.literal(str(tmp_path))}/{name}"
    Path(fields.fill(path, values)).mkdir()
    assert glob.glob(fields.as_glob(path, {})) == [fields.fill(path, values)]
    assert fields.fill(fields.literal(name), {}) == name


# The newest checkpoint.


def age(path: Path, seconds: int) -> None:
    for file in path.iterdir():
        os.utime(file, (1_800_000_000 - seconds, 1_800_000_000 - seconds))


def test_the_highest_number_is_the_newest_whatever_the_files_times(runs):
    for step in (500, 1000, 900):
        age(runs.add(f"checkpoint-{step}", step), seconds=step)
    assert newest("runs/latest", "finetuned") == ("runs/checkpoint-1000", ())


def test_where_names_differ_otherwise_what_was_written_last_is_the_newest(runs):
    for name, seconds in (("final", 30), ("best", 10), ("checkpoint-9", 20)):
        age(runs.add(name, 1), seconds)
    assert newest("runs/latest", "finetuned")[0] == "runs/best"


def test_a_checkpoint_that_is_still_being_written_is_passed_over_and_named(runs):
    runs.add("checkpoint-1", 1)
    torn, without_index = runs.add("checkpoint-2", 2), runs.add("checkpoint-3", 3)
    whole = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(whole[:-7])
    (without_index / "model.safetensors").rename(without_index / "model-00001-of-00002.safetensors")
    save(runs.folder / "other", {"b": torch.zeros(2)})
    (runs.folder / "other/model.safetensors").rename(without_index / "model-00002-of-00002.safetensors")
    result = runs.prune()
    assert result.plan.recipe.finetuned == "runs/checkpoint-1"
    passed = [o for o in result.plan.warnings if "passed over" in o]
    assert [p.split()[0] for p in passed] == ["runs/checkpoint-3", "runs/checkpoint-2"]
    assert "2 files and no index yet" in passed[0]


def test_a_folder_that_is_called_latest_is_taken_as_it_is(runs):
    runs.add("checkpoint-1", 1)
    runs.add("checkpoint-2", 2)
    Path("runs/latest").symlink_to("checkpoint-1")
    assert newest("runs/latest", "finetuned") == ("runs/latest", ())


def test_without_a_whole_checkpoint_it_says_so(runs):
    Path("runs/logs").mkdir(parents=True)
    with pytest.raises(UserError, match="runs/latest stands for the newest checkpoint in runs, which holds none"):
        runs.prune()
    with pytest.raises(UserError, match="there is no folder nothing/latest"):
        runs.prune(finetuned="nothing/latest")


def test_old_manifests_without_the_paths_as_given_are_read(runs):
    runs.add("checkpoint-900", 1)
    out = Path(runs.prune().plan.recipe.out)
    manifest = json.loads((out / "fapm/manifest.json").read_text())
    del manifest["paths_given"], manifest["paths"]["out"]
    (out / "fapm/manifest.json").write_text(json.dumps(manifest))
    assert runs.prune(day=2).nothing_to_do
    assert verify(str(out)) == []
