"""pytest tests/cluster/test_submission.py: what is sent to a cluster, and how its answers are understood; without Ray's
processes.

`test_job.py` has the real Jobs API.
"""

from __future__ import annotations

import io
import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import gaussian
from click.testing import CliRunner
from conftest import Runner
from every_option import OPTIONS, WORDS

from fapm import Recipe, UserError, prune
from fapm.cluster.cli import cli
from fapm.cluster.options import gather_sources
from fapm.recipe import command_words
from fapm.reporting.progress import Progress, Retold

pytest.importorskip("ray")

from ray.job_submission import JobDetails

from fapm.cluster import job
from fapm.cluster.job import _job, runtime_env
from fapm.cluster.submission import Job, Submission, decide, make_submission


class Cluster:
    """A Jobs API that remembers what it was given."""

    def __init__(self) -> None:
        self.submitted: list[dict[str, Any]] = []
        self.shipped: set[str] = set()

    def list_jobs(self) -> list[JobDetails]:
        return []

    def submit_job(self, runtime_env: dict[str, Any], **how: Any) -> None:
        folder = Path(runtime_env["working_dir"])
        self.shipped = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        self.submitted.append({"runtime_env": runtime_env, **how})


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster()
    monkeypatch.setattr(job, "_Client", lambda address: found)
    return found


@pytest.fixture
def pair(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> Runner:
    runner.write(*gaussian({"model.norm.weight": (40,), "model.layers.0.w": (50, 40)}, torch.bfloat16))
    monkeypatch.chdir(runner.folder)
    return runner


def submit(*args: str) -> Any:
    return CliRunner().invoke(cli, ["submit", *args, "--no-wait", "--json"], catch_exceptions=False)


def arguments(cluster: Cluster) -> list[str]:
    """Those of `fapm` on the cluster."""
    words = shlex.split(cluster.submitted[-1]["entrypoint"])
    assert words[:6] == ["exec", "env", "FAPM_PROGRESS=json", "python3", "-m", "fapm"]
    return words[6:]


def test_every_option_given_after_the_recipe_reaches_the_cluster(pair, cluster):
    (pair.folder / "r.yaml").write_text("base: base\nfinetuned: finetuned\nout: out\ndensity: 0.3\nray: local\n")
    words = [*WORDS, "--ray", "off", "--rule", "*norm*=finetuned", "--rule", "it's *=base"]
    offered = {option for p in cli.commands["prune"].params for option in p.opts if option.startswith("--")}
    given = {word for word in words if word.startswith("--")}
    assert given | {"--rename", "--overwrite", "--json"} == offered - {
        "--base", "--finetuned", "--out", "--config", "--help-all", "--quiet", "--verbose", "--strict"
    }  # fmt: skip
    assert submit("r.yaml", *words, "--overwrite").exit_code == 0
    # What the cluster is told, read by the command line that reads it there.
    told: dict[str, Any] = {}
    here = cli.commands["prune"]
    with here.make_context("prune", arguments(cluster)[1:]) as context:
        told = context.params
    assert (told["ray"], told["overwrite"], told["as_json"], told["config"]) == ("off", True, True, None)
    made = Recipe.of(
        **{k: v for k, v in told.items() if k not in ("ray", "overwrite", "as_json", "config") and v != ()}
    )
    folder = pair.folder
    sides = {side: str(folder / side) for side in ("base", "finetuned", "out")}
    choices = {name.replace("-", "_"): value for name, value in OPTIONS.items() if name != "label"}
    assert made == Recipe.of(
        **sides,
        **choices,
        labels=("market-type=!spot",),
        rules=("*norm*=finetuned", "it's *=base"),
        allow_pickle=True,
        allow_code=True,
        plain_codes=True,
        reversible=True,
        alone=True,
        allow_same=True,
    )


def test_the_package_is_shipped_and_not_the_folder_of_the_user(pair, cluster):
    (pair.folder / "secret.txt").write_text("mine")
    assert submit("--base", "base", "--finetuned", "finetuned", "--out", "out").exit_code == 0
    assert {"fapm/run.py", "fapm/__main__.py", "fapm/cluster/job.py"} <= cluster.shipped
    assert {name.split("/")[0].split("-")[0] for name in cluster.shipped} == {"fapm"}
    assert not any("__pycache__" in name for name in cluster.shipped)


@pytest.mark.parametrize(
    "choices",
    [{}, {"density": 0.5, "scope": "global"}, {"rules": ("a b=base", "*'\"=0.05")}, {"labels": ("a=b", "c=!d")},
     {"workers": "2-8", "memory": "3GiB", "shard_size": "5MB", "seed": 9, "layer_scale": "0.5:1"}],
)  # fmt: skip
def test_the_options_of_a_recipe_make_it_again(choices):
    recipe = Recipe.of(base="b", finetuned="f x", out="{date}-{{o}}", **choices)
    with cli.commands["prune"].make_context("prune", command_words(recipe)[1:]) as context:
        again = {k: v for k, v in context.params.items() if v not in (None, (), False)}
    assert Recipe.of(**again) == recipe


def test_the_options_of_a_merge_make_it_again():
    sources = [{"finetuned": "f 1", "weight": 0.5, "density": 0.2}, {"finetuned": "f2", "method": "dare", "seed": 4}]
    recipe = Recipe.of(base="b", merged=sources, out="o", combine="ties", scaling=0.9, scope="layer", workers=3)
    name, *words = command_words(recipe)
    assert name == "merge"
    with cli.commands["merge"].make_context("merge", words) as context:
        given = gather_sources(dict(context.params))
    again = Recipe.of(**{k: v for k, v in given.items() if v not in (None, (), False)})
    assert again.lanes == recipe.lanes
    assert [of.weight for of in again.merged] == [0.5, 1.0]
    assert again.model_copy(update={"merged": recipe.merged, "scope": "layer"}) == recipe


# Identity.


def made(runner: Runner, overwrite: bool = False, **choices: Any) -> Submission:
    recipe = runner.recipe("out", **choices)
    return make_submission(recipe, "auto", overwrite, lambda line: None)


def test_a_submission_is_its_recipe_and_its_inputs(pair):
    first = made(pair)
    assert made(pair) == first
    assert first.id(1) == f"fapm-{first.digest}-1"
    assert len({first.digest, made(pair, density=0.2).digest, made(pair, rules=["*norm*=base"]).digest}) == 3
    assert made(pair, workers=7, memory="2GiB").digest == first.digest  # other means, the same bytes
    os.utime(pair.folder / "finetuned/model.safetensors", (5, 5))
    assert made(pair).digest != first.digest


def test_dates_do_not_make_another_submission(pair, monkeypatch):
    digests = set()
    for day in ("2026-12-01", "2026-12-02"):
        monkeypatch.setattr("fapm.fields.times", lambda day=day: {"date": day, "time": "000000"})
        submission = make_submission(pair.recipe("{date}"), "auto", False, lambda line: None)
        assert submission.recipe.out == str(pair.folder / day)
        digests.add(submission.digest)
    assert len(digests) == 1


def test_overwrite_is_for_what_else_is_there(pair):
    prune(pair.recipe("out", density=0.5))
    with pytest.raises(UserError, match="--overwrite"):
        made(pair)
    assert made(pair, overwrite=True).overwrite
    prune(pair.recipe("out"), overwrite=True)
    again = made(pair, overwrite=True)
    assert (again.state, again.overwrite) == ("finished", False)


def test_a_typing_error_in_one_path_is_found_here(pair):
    with pytest.raises(UserError, match="there is no folder"):
        make_submission(pair.recipe("out").model_copy(update={"base": "bsae"}), "auto", False, lambda line: None)


def known(state: str, attempt: int = 1, code: int | None = None) -> Job:
    return Job(f"fapm-0-{attempt}", state, code, "out", 1.0, 2.0, "")


def test_what_is_done_instead_of_submitting_again():
    assert decide([], "new") is None
    assert decide([known("failed", code=1), known("stopped", code=143)], "unfinished") is None
    assert decide([known("failed"), known("running", 2)], "unfinished").id == "fapm-0-2"
    assert decide([known("pending")], None).how == "already running"
    assert decide([known("succeeded", code=0)], "finished").id == "fapm-0-1"
    assert decide([], "finished").how == "nothing to do"
    assert decide([known("succeeded", code=0)], "new") is None  # the output is gone
    assert decide([known("succeeded", code=0)], None) is None  # who knows: the job will see


# What the cluster says.


@pytest.mark.parametrize(
    ("status", "exit_code", "error_type", "code"),
    [
        ("SUCCEEDED", 0, None, 0),
        ("FAILED", 75, "JOB_ENTRYPOINT_COMMAND_ERROR", 75),
        ("FAILED", 1, "JOB_ENTRYPOINT_COMMAND_ERROR", 1),
        ("FAILED", -9, "JOB_ENTRYPOINT_COMMAND_ERROR", 137),
        ("FAILED", None, "JOB_SUPERVISOR_ACTOR_DIED", 75),
        ("FAILED", None, "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE", 75),
        ("FAILED", None, "RUNTIME_ENV_SETUP_FAILURE", 1),
        ("STOPPED", None, None, 143),
        ("RUNNING", None, None, None),
        ("PENDING", None, None, None),
    ],
)
def test_the_exit_code_of_a_job_is_that_of_its_run(status, exit_code, error_type, code):
    details = JobDetails(
        type="SUBMISSION", submission_id="fapm-0-1", status=status, entrypoint="", driver_exit_code=exit_code,
        error_type=error_type, message="why", metadata={"out": "o"},
    )  # fmt: skip
    found = _job(details)
    assert (found.code, found.out) == (code, "o")
    assert found.message == ("why" if status == "FAILED" and exit_code is None else "")


def test_a_runtime_environment_is_the_users_with_what_is_needed(tmp_path):
    path = tmp_path / "env.yaml"
    path.write_text("env_vars: {HF_HOME: /nfs/hf}\n")
    assert runtime_env(str(path), install=False) == {"env_vars": {"HF_HOME": "/nfs/hf"}}
    wanted = runtime_env(str(path), install=True)["pip"]
    names = {requirement.split(">")[0] for requirement in wanted}
    assert {"torch", "numba", "safetensors", "click"} <= names
    assert not names & {"ray[default]", "pytest"}
    path.write_text("pip: [torch]\n")
    with pytest.raises(UserError, match="--install does nothing beside pip"):
        runtime_env(str(path), install=True)


# Progress from elsewhere.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines_of_a_run(pair: Runner, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a run says as a job."""
    monkeypatch.setenv("FAPM_PROGRESS", "json")
    stream = io.StringIO()
    with Progress(stream) as progress:
        prune(pair.recipe(shard_size="2kB"), watch=progress.watch())
    return stream.getvalue().splitlines()


def test_a_follower_shows_the_bar_of_the_run(pair, monkeypatch):
    lines = lines_of_a_run(pair, monkeypatch)
    told = [json.loads(line)["progress"] for line in lines if line.startswith("{")]
    total = 2 * 2 * (40 + 50 * 40)
    assert told[0] == {"bytes": 0, "of_bytes": total, "shards": 0, "of_shards": 2}
    assert told[-1] == {"bytes": total, "of_bytes": total, "shards": 2, "of_shards": 2}
    terminal = Terminal()
    with Progress(terminal) as progress:
        retold = Retold(progress)
        for line in ["Running entrypoint for job fapm-0-1: exec", *lines, '{"out": "o", "totals": {}}']:
            retold.hear(line)
    shown = terminal.getvalue()
    assert "shard 2/2: 100%" in shown.split("\r")[-2] or "shard 2/2: 100%" in shown
    assert "pruning 2 tensors into 2 shard(s)" in shown
    assert "[1/2]" not in shown
    assert "Running" not in shown
    assert retold.result == {"out": "o", "totals": {}}


def test_without_a_terminal_a_follower_says_what_the_run_says(pair, monkeypatch):
    lines = lines_of_a_run(pair, monkeypatch)
    monkeypatch.delenv("FAPM_PROGRESS")
    stream = io.StringIO()
    with Progress(stream) as progress:
        retold = Retold(progress)
        for line in [*lines, "{broken", '{"other": 1}']:
            retold.hear(line)
    said = [line for line in lines if not line.startswith("{")]
    assert stream.getvalue().splitlines() == [*said, "{broken", '{"other": 1}']
    assert sum("[" in line for line in said) == 2
