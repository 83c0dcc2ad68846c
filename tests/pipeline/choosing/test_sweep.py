"""A sweep makes what single prunes make, from one reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import gaussian, save

from fapm import Recipe, UserError, prune
from fapm.checking.verify import verify
from fapm.choosing.candidates import candidates
from fapm.choosing.sweep import sweep, sweep_folder
from fapm.schedule import Watch
from fapm.shard.worker import Worker

SHAPES = {
    "model.embed.weight": (40, 8), "model.layers.0.a": (300, 70), "model.layers.0.b": (11,),
    "model.layers.1.a": (1 << 20, 2), "model.layers.1.b": (11,), "norm": (5,), "one": (), "empty": (0, 3),
}  # fmt: skip
LISTS = {"method": "fapm,magnitude,wise-ft,random,dare", "scope": "tensor,layer,global", "density": "0,0.05,0.3,1"}
MEANS = {"device": "cpu", "workers": 1, "shard_size": "3MB"}


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    base, finetuned = gaussian(SHAPES, torch.bfloat16)
    save(tmp_path / "base", base | {"ids": torch.arange(7), "old": torch.ones(2)})
    save(tmp_path / "finetuned", finetuned | {"ids": torch.arange(7), "new": torch.ones(3)})
    return tmp_path


def sides(folder: Path) -> dict[str, str]:
    return {side: str(folder / side) for side in ("base", "finetuned", "out")}


def swept(folder: Path, watch: Watch | None = None, **choices: Any) -> list[Any]:
    choices = sides(folder) | MEANS | choices
    kept = {name: value for name, value in choices.items() if name not in ("method", "scope", "density")}
    return sweep(candidates(choices, sweep_folder(Recipe.of(**kept))), watch=watch)


def stored(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".json")}


def same_as_alone(folder: Path, made: list[Any], **choices: Any) -> None:
    """Every candidate is what `prune` makes of its recipe: bytes, choices, what was measured of the tensors."""
    for one in made:
        recipe, out = one.candidate.recipe, folder / "alone" / one.candidate.name
        found = prune(recipe.model_copy(update={"out": str(out), **choices}))
        assert stored(Path(recipe.out)) == stored(out), one.candidate.name
        assert one.manifest["totals"] | {"read_bytes": 0} == found.manifest["totals"] | {"read_bytes": 0}
        assert one.manifest["recipe"] == found.manifest["recipe"]
        assert one.manifest.get("rounds") == found.manifest.get("rounds")
        assert verify(recipe.out) == []


@pytest.mark.parametrize("emit", ["checkpoint", "delta", "both"])
def test_candidates_are_what_prune_makes_alone(pair, emit):
    densities = LISTS["density"] if emit == "checkpoint" else "0.1,1"
    made = swept(pair, emit=emit, **LISTS | {"density": densities})
    assert len(made) == len(densities.split(",")) * (4 * 3 + 1)
    same_as_alone(pair, made)


def test_densities_of_rules_meet_those_of_candidates(pair):
    made = swept(pair, density="0.1,0.2", method="dare,wise-ft,fapm", rules=["*.b=0.1", "norm=0.2", "one=base"])
    same_as_alone(pair, made)


def test_a_group_may_lie_in_one_shard_for_one_scope_and_in_many_for_another(pair):
    made = swept(pair, density="0.1,0.2", scope="tensor,layer,global", shard_size="1GiB")
    same_as_alone(pair, made)


@pytest.mark.parametrize("workers", [1, 3])
def test_what_does_not_fit_in_memory_is_streamed(pair, workers):
    base, finetuned = gaussian({"a": (3000, 4000), "b": (3000, 1000)}, torch.float32)
    save(pair / "base", base)
    save(pair / "finetuned", finetuned)
    made = swept(pair, density="0.1,0.2", memory="176MiB", scope="tensor,global", workers=workers, shard_size="1GiB")
    same_as_alone(pair, made)


def test_the_inputs_are_read_once(pair):
    made = swept(pair, **LISTS | {"scope": "tensor"})
    size = sum(path.stat().st_size for side in ("base", "finetuned") for path in (pair / side).glob("*.safetensors"))
    assert {one.manifest["totals"]["read_bytes"] for one in made} == {made[0].manifest["totals"]["read_bytes"]}
    assert made[0].manifest["totals"]["read_bytes"] <= size


def test_as_many_at_once_as_memory_allows(pair):
    said: list[str] = []
    made = swept(pair, Watch(say=said.append), density="0.1,0.2,0.3", memory="90MiB")
    assert any("the inputs are read 3 times" in line for line in said)
    same_as_alone(pair, made)


def test_it_goes_on_where_it_was_stopped(pair, monkeypatch):
    write, calls = Worker.write, []

    def broken(self, task, following=None):
        calls.append(task.shard.index)
        if len(calls) == 2:
            raise UserError("no more")
        return write(self, task, following)

    monkeypatch.setattr(Worker, "write", broken)
    with pytest.raises(UserError, match="no more"):
        swept(pair, density="0.1,0.2", scope="global")
    monkeypatch.setattr(Worker, "write", write)
    done = pair / "out" / "sweep" / "fapm-0.1" / "fapm" / "work"
    assert len(list(done.glob("shard-*.json"))) == 1
    made = swept(pair, density="0.1,0.2,0.4", scope="global")
    assert [one.manifest["resumed"] for one in made] == [1, 1, 0]
    assert not any(one.was_there for one in made)
    same_as_alone(pair, made)
    again = swept(pair, density="0.1,0.2,0.4,0.5", scope="global")
    assert [one.was_there for one in again] == [True, True, True, False]
    same_as_alone(pair, again)


def test_what_was_lost_beside_a_finished_candidate_is_made_again(pair):
    swept(pair, density="0.1,0.2")
    card = pair / "out" / "sweep" / "fapm-0.1" / "README.md"
    before = card.read_bytes()
    card.unlink()
    made = swept(pair, density="0.1,0.2")
    assert card.read_bytes() == before
    assert [one.was_there for one in made] == [False, True]


def test_other_inputs_are_refused(pair):
    swept(pair, density="0.1,0.2")
    save(pair / "finetuned", gaussian(SHAPES, torch.float32)[1])
    with pytest.raises(UserError, match="belongs to another run"):
        swept(pair, density="0.1,0.2")


def test_names(tmp_path):
    choices = {"base": "b", "finetuned": "f", "out": "o"}
    assert [c.name for c in candidates(choices | {"method": ["fapm", "wise-ft"], "density": [0.1, 0.25]}, "x")] == [
        "fapm-0.1", "fapm-0.25", "wise-ft-0.1", "wise-ft-0.25",
    ]  # fmt: skip
    found = candidates(choices | {"method": "fapm,wise-ft", "scope": "tensor, global", "density": 0.12345678}, "x")
    assert [c.name for c in found] == ["fapm-tensor-0.12345678", "fapm-global-0.12345678", "wise-ft-0.12345678"]
    assert found[1].recipe.out == "x/fapm-global-0.12345678"
    with pytest.raises(UserError, match="--density"):
        candidates(choices | {"density": "0.1,2"}, "x")
    with pytest.raises(UserError, match="more than 200"):
        candidates(choices | {"density": [i / 1000 for i in range(300)]}, "x")
    with pytest.raises(UserError, match="no fields"):
        sweep_folder(Recipe.of(**choices | {"out": "o/{date}"}))


def test_a_candidate_is_an_output_like_any_other(pair):
    swept(pair, density="0.1,0.2")
    out = pair / "out" / "sweep" / "fapm-0.2"
    assert json.loads((out / "fapm" / "manifest.json").read_text())["recipe"]["density"] == 0.2
    assert "--density 0.2" in (out / "README.md").read_text()
    prune(Recipe.of(**sides(pair) | MEANS, density=0.2))  # beside them
    assert stored(pair / "out") == stored(out)
    assert verify(str(pair / "out")) == []
