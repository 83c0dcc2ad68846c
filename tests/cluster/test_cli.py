"""pytest tests/cluster/test_cli.py: the command as its users meet it, on checkpoints of a few kilobytes.

Most tests call the command in this process; those about signals, terminals, pipes, imports and time start `python -m
cluster`.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import math
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import every_option
import pytest
import torch
import yaml
from checkpoints import MODEL_SHAPES, gaussian, load, save, weights_of
from click.testing import CliRunner, Result
from pace import cpu_seconds

from fapm.cluster.cli import cli
from fapm.errors import UserError
from fapm.reporting.progress import Progress

COMMANDS = (
    "prune",
    "sweep",
    "compare",
    "apply",
    "extract",
    "plan",
    "inspect",
    "report",
    "status",
    "verify",
    "demo",
    "submit",
    "jobs",
    "logs",
    "stop",
)


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with base/ and finetuned/, which becomes the working directory."""
    base, finetuned = gaussian(MODEL_SHAPES)
    save(tmp_path / "base", base, shards=2)
    save(tmp_path / "finetuned", finetuned)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


def fapm(*args: str) -> Result:
    return CliRunner().invoke(cli, args, prog_name="fapm", catch_exceptions=False)


def on_pair(command: str, *args: str, out: str = "out") -> Result:
    return fapm(command, "--base", "base", "--finetuned", "finetuned", "--out", out, *args)


def process(*args: str, **options: object) -> subprocess.Popen[bytes]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "fapm", *args],
        **options,  # type: ignore[arg-type]
    )


def refused(result: Result, code: int = 1) -> str:
    """The one line with which a command says what is wrong."""
    assert result.exit_code == code
    assert result.stdout == ""
    line = result.stderr.splitlines()[-1]
    assert line.startswith("fapm: ")
    assert "Traceback" not in result.stderr
    return line.removeprefix("fapm: ")


# prune


def test_prune_keeps_the_share_asked_of_every_tensor(pair):
    assert on_pair("prune", "--density", "0.5").exit_code == 0
    base, finetuned, out = (load(pair / name) for name in ("base", "finetuned", "out"))
    for name, f in finetuned.items():
        kept = (out[name] == f) & (f != base[name])
        assert int(kept.sum()) == int(f.numel() * 0.5)
        assert torch.equal(out[name][~kept], base[name][~kept])


def test_every_option_arrives(pair):
    rules = ["--rule", "*norm*=finetuned", "--rule", "lm_head.*=base"]
    assert on_pair("prune", *every_option.WORDS, *rules).exit_code == 0
    assert yaml.safe_load((pair / "out/fapm/recipe.yaml").read_text()) == {
        **{side: str(pair / side) for side in ("base", "finetuned", "out")}, "strength": 2.0, "tail": 0.5,
        "merged": [], "combine": "sum", "scaling": 1.0, "layer_scale": "0.5:1.0", "rank": 9,
        "density": 0.25, "method": "random", "scope": "layer",
        "dtype": "bfloat16", "shard_size": 4000, "memory": 200_000_000, "device": "cpu", "workers": "2-3", "seed": 7,
        "cpus_per_worker": 2, "gpus_per_worker": 0.5, "accelerator": "A100", "labels": ["market-type=!spot"],
        "staging": "st", "visibility": "public", "alone": True, "device_memory": 2_000_000_000,
        "nonfinite": "base", "rules": ["*norm*=finetuned", "lm_head.*=base"],
        "allow_pickle": True, "allow_code": True, "reversible": True, "renames": [],
        "emit": "both", "delta_compression": "none",
        "on_conflict": "last", "unpaired": "pass", "plain_codes": True, "allow_same": True, "strict": False,
    }  # fmt: skip


def test_flags_override_the_recipe_and_the_recipe_the_defaults(pair):
    (pair / "r.yaml").write_text("base: base\nfinetuned: finetuned\nout: out\ndensity: 0.3\nscope: layer\nray: off\n")
    result = fapm("plan", "--config", "r.yaml", "--density", "0.4", "--json")
    recipe = json.loads(result.stdout)["recipe"]
    assert (recipe["density"], recipe["scope"], recipe["method"]) == (0.4, "layer", "fapm")


def test_json_is_one_object_on_stdout(pair):
    result = on_pair("prune", "--json", "--shard-size", "4kB")
    facts = json.loads(result.stdout)
    out = load(pair / "out")
    assert facts["out"] == "out"
    assert facts["shards"] == len(list((pair / "out").glob("*.safetensors"))) > 1
    assert facts["totals"]["tensors"] == len(out) == len(MODEL_SHAPES)
    assert facts["totals"]["kept"] == sum(int(math.prod(shape) * 0.1) for shape in MODEL_SHAPES.values())
    assert facts["totals"]["written_bytes"] == sum(f.stat().st_size for f in (pair / "out").glob("*.safetensors"))
    assert (facts["resumed"], facts["nothing_to_do"], facts["oddities"]) == (0, False, [])
    assert facts["seconds"] > 0


def test_a_finished_run_says_that_there_is_nothing_to_do(pair):
    on_pair("prune")
    times = {f: f.stat().st_mtime_ns for f in (pair / "out").rglob("*")}
    again = on_pair("prune")
    assert again.exit_code == 0
    assert "already finished" in again.stdout
    assert "nothing to do" in again.stdout
    assert json.loads(on_pair("prune", "--json").stdout)["nothing_to_do"] is True
    assert times == {f: f.stat().st_mtime_ns for f in (pair / "out").rglob("*")}


def test_another_recipe_is_refused_unless_told_to_overwrite(pair):
    on_pair("prune")
    assert "density was 0.1 and is 0.2" in refused(on_pair("prune", "--density", "0.2"))
    assert on_pair("prune", "--density", "0.2", "--overwrite").exit_code == 0


def test_without_a_terminal_each_shard_is_a_plain_line(pair):
    result = on_pair("prune", "--shard-size", "4kB")
    count = len(list((pair / "out").glob("*.safetensors")))
    lines = [line for line in result.stderr.splitlines() if line.startswith("[")]
    assert [line.split("]")[0] for line in lines] == [f"[{i}/{count}" for i in range(1, count + 1)]
    assert {line.split()[1] for line in lines} == {f.name for f in (pair / "out").glob("*.safetensors")}
    assert "\r" not in result.stderr


# What is wrong is said in one line.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--density", "2"], "--density"),
        (["--density", "much"], "--density"),
        (["--method", "sparsegpt"], "(it is sparsegpt)"),
        (["--scope", "block"], "--scope"),
        (["--dtype", "int8"], "--dtype"),
        (["--device", "tpu"], "--device"),
        (["--memory", "lots"], "'lots'"),
        (["--workers", "0"], "--workers"),
        (["--rule", "lm_head"], "--rule: lm_head is not a rule"),
        (["--rule", "lm_head=1.5"], "lm_head=1.5: a density is at least 0 and at most 1"),
        (["--memory", "10"], "--memory: at least 64MiB (it is 10)"),
        (["--memory", "10MB"], "--memory: at least 64MiB (it is 10MB)"),
        (["--density", "3"], "--density: 0 to 1 (it is 3)"),
        (["--workers", "0"], "--workers: give a number like 4 or a range like 2-8, of 1 to 100,000 (it is 0)"),
        (["--workers", "5-2"], "a range like 2-8, of 1 to 100,000 (it is 5-2)"),
        (["--cpus-per-worker", "0"], "--cpus-per-worker: 1 to 1,024 (it is 0)"),
        (["--gpus-per-worker", "1.5"], "--gpus-per-worker: 0 to 1 (it is 1.5)"),
        (["--label", "spot"], "--label: write a label like market-type=spot"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--ray", ""], "--ray"),
    ],
)
@pytest.mark.parametrize("command", ["prune", "plan"])
def test_a_wrong_value_is_named(pair, command, options, said):
    assert said in refused(on_pair(command, *options))
    assert not (pair / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("densty: 0.1", "'densty'"),
        ("density: 0.1\nbatch-size: 3", "'batch_size'"),
        ("density: [", "r.yaml"),
        ("- density", "r.yaml"),
        ("!!python/object/apply:os.system ['true']", "r.yaml"),
        ("ray: 5", "ray in r.yaml"),
        ("ray: on", "ray in r.yaml"),
        # These two need pipeline/recipe.py: `of` must take `cls` by position only, and `rules` be checked to be a list.
        ("cls: 1", "'cls'"),
        ("rules: 5", "rule"),
    ],
)
def test_a_wrong_recipe_is_named(pair, recipe, said):
    (pair / "r.yaml").write_text(recipe)
    assert said in refused(on_pair("prune", "--config", "r.yaml"))


def test_wrong_folders_are_named(pair):
    (pair / "empty").mkdir()
    assert "there is no folder nowhere" in refused(
        fapm("prune", "--base", "nowhere", "--finetuned", "finetuned", "--out", "o")
    )
    assert "no checkpoint in empty" in refused(fapm("prune", "--base", "base", "--finetuned", "empty", "--out", "o"))
    assert "base checkpoint itself" in refused(on_pair("prune", out="base"))
    assert "finetuned checkpoint itself" in refused(on_pair("plan", out="finetuned"))
    assert "there is no folder nowhere" in refused(fapm("inspect", "nowhere"))
    assert "nowhere" in refused(fapm("report", "nowhere"))
    assert "no output of fapm" in refused(fapm("report", "base"))
    assert "no output of fapm" in refused(fapm("verify", "base"))


def test_an_output_that_cannot_be_written_is_named(pair):
    assert "finetuned/config.json/out" in refused(on_pair("prune", out="finetuned/config.json/out"))
    assert "is a file" in refused(on_pair("prune", out="finetuned/config.json"))


@pytest.mark.parametrize("command", ["prune", "plan", "inspect"])
def test_a_truncated_file_is_named(pair, command):
    path = pair / "finetuned" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    result = fapm("inspect", "finetuned") if command == "inspect" else on_pair(command)
    assert "finetuned/model.safetensors" in (line := refused(result))
    assert "truncated" in line


def test_weights_that_are_not_finite_are_named(pair):
    _, finetuned = gaussian(MODEL_SHAPES)
    finetuned["lm_head.weight"][3, 3] = math.nan
    save(pair / "finetuned", finetuned)
    line = refused(on_pair("prune"))
    assert "lm_head.weight" in line
    assert "1 NaN" in line
    assert "--nonfinite base" in line
    assert on_pair("prune", "--nonfinite", "base", "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["prune"], "--base, --finetuned, --out"),
        (["plan", "--base", "base"], "--finetuned, --out"),
        (["prune", "base", "finetuned", "out"], "unexpected extra arguments"),
        (["prune", "--densty", "0.1"], "--densty"),
        (["report"], "OUT"),
        (["prone"], "prone"),
    ],
)
def test_wrong_usage_exits_with_2(pair, args, said):
    result = fapm(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert said in result.stderr


def test_a_bug_shows_its_traceback(pair):
    code = "import fapm.formats.checkpoint as c; c.read_header = 0; from fapm.cluster.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", "base"],
        capture_output=True,
    )
    assert done.returncode == 1
    assert b"Traceback" in done.stderr
    assert b"TypeError" in done.stderr


# The other commands.


def test_plan_says_what_prune_then_does(pair):
    planned = json.loads(on_pair("plan", "--json", "--shard-size", "4kB").stdout)
    assert not (pair / "out").exists()
    done = json.loads(on_pair("prune", "--json", "--shard-size", "4kB").stdout)
    assert planned["write_bytes"] == done["totals"]["written_bytes"]
    assert planned["read_bytes"] == sum(t.nbytes for side in ("base", "finetuned") for t in load(pair / side).values())
    assert planned["shards"] == planned["workers_worth_having"] == done["shards"]
    assert planned["kept_elements"] == done["totals"]["kept"]
    assert planned["groups"] == len(MODEL_SHAPES)
    assert (planned["state"], planned["wide_groups"], planned["read_twice_bytes"]) == ("new", 0, 0)
    after = json.loads(on_pair("plan", "--json", "--shard-size", "4kB").stdout)
    assert (after["state"], after["shards_to_do"]) == ("finished", 0)


def test_plan_counts_what_a_wide_group_reads_twice(pair):
    wide = ("plan", "--json", "--shard-size", "4kB", "--scope", "global")
    planned = json.loads(on_pair(*wide).stdout)
    assert (planned["groups"], planned["wide_groups"]) == (1, 1)
    assert planned["read_twice_bytes"] == planned["read_bytes"]
    for nothing_to_measure in (["--density", "1"], ["--density", "0"], ["--method", "wise-ft"]):
        options = ["--json", "--shard-size", "4kB", "--scope", "global", *nothing_to_measure]
        assert json.loads(on_pair("plan", *options).stdout)["read_twice_bytes"] == 0


def test_plan_lists_what_is_not_pruned(pair):
    base, finetuned = gaussian(MODEL_SHAPES)
    finetuned["lm_head.weight"] = torch.cat([finetuned["lm_head.weight"], torch.ones(2, 16)])
    finetuned["positions"] = base["positions"] = torch.arange(9)
    base["old"] = finetuned["new"] = torch.ones(3)
    save(pair / "base", base, shards=2)
    save(pair / "finetuned", finetuned)
    options = ["--rule", "model.norm.*=base", "--unpaired", "pass"]
    planned = json.loads(on_pair("plan", "--json", *options).stdout)
    assert planned["pruned"] == len(MODEL_SHAPES) - 2
    assert planned["ruled"] == ["model.norm.weight"]
    assert planned["grown"] == ["lm_head.weight"]
    assert planned["passed_through"] == ["positions"]
    assert (planned["added"], planned["left_out"]) == (["new"], ["old"])
    assert planned["unpaired"] == 3 + 2 * 16
    assert planned["density_of_all"] > planned["kept_elements"] / planned["weights"]
    text = on_pair("plan", *options).stdout
    assert "35 have no partner in base" in text
    for name in ("model.norm.weight", "lm_head.weight", "positions", "new", "old"):
        assert name in text


def test_plan_says_that_the_disk_is_too_full(pair, monkeypatch):
    monkeypatch.setattr("fapm.storage.local.Folder.free_bytes", lambda self: 1000)
    assert "1 kB free" in refused(on_pair("plan"), code=75)


def test_inspect_counts_what_is_in_a_checkpoint(pair):
    facts = json.loads(fapm("inspect", "base", "--json").stdout)
    assert facts["tensors"] == sum(p["tensors"] for p in facts["patterns"]) == len(MODEL_SHAPES)
    assert facts["parameters"] == sum(math.prod(shape) for shape in MODEL_SHAPES.values())
    assert facts["bytes"] == facts["dtypes"]["F32"]["bytes"] == 4 * facts["parameters"]
    assert facts["layers"] == {"model.layers": 3}
    assert facts["files"] == {f.name: f.stat().st_size for f in (pair / "base").glob("*.safetensors")}
    up = next(p for p in facts["patterns"] if p["name"] == "model.layers.*.mlp.up.weight")
    assert (up["tensors"], up["shape"], up["dtype"]) == (3, [33, 16], "F32")
    text = fapm("inspect", "base").stdout
    assert "model.layers.*.experts.*.w1.weight" in text
    assert "3 in model.layers" in text


def test_inspect_finds_the_newest_checkpoint(pair):
    for step in (9, 10):
        save(pair / "runs" / f"checkpoint-{step}", {"w": torch.zeros(step)})
    facts = json.loads(fapm("inspect", "runs/latest", "--json").stdout)
    assert (facts["path"], facts["parameters"]) == ("runs/checkpoint-10", 10)


def test_report_ranks_tensors_by_what_they_keep(pair):
    on_pair("prune")
    base, finetuned, out = (load(pair / name) for name in ("base", "finetuned", "out"))
    share = {n: float((out[n] - base[n]).norm() ** 2 / (f - base[n]).norm() ** 2) for n, f in finetuned.items()}
    ranked = sorted(share, key=share.__getitem__)
    facts = json.loads(fapm("report", "out", "--json").stdout)
    assert [row["name"] for row in facts["lowest"]] == ranked[:5]
    assert [row["name"] for row in facts["highest"]] == ranked[::-1][:5]
    assert facts["highest"][0]["kept_share"] == pytest.approx(share[ranked[-1]], rel=1e-5)
    table = on_pair("prune").stdout.splitlines()
    assert [line for line in table if "already" not in line] == fapm("report", "out").stdout.splitlines()[
        : len(table) - 1
    ]


def test_verify_says_what_it_checked(pair):
    on_pair("prune", "--shard-size", "4kB")
    result = fapm("verify", "out")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 1
    assert f"{len(MODEL_SHAPES)} tensor(s)" in result.stdout


def test_verify_finds_a_flipped_bit(pair):
    on_pair("prune", "--shard-size", "4kB")
    path = sorted((pair / "out").glob("*.safetensors"))[1]
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 0x40
    path.write_bytes(damaged)
    result = fapm("verify", "out")
    assert result.exit_code == 1
    assert path.name in result.stdout
    assert result.stderr.splitlines()[-1].startswith("fapm: out:")
    facts = fapm("verify", "out", "--json")
    assert facts.exit_code == 1
    assert json.loads(facts.stdout)["problems"] == result.stdout.splitlines()


def test_verify_takes_inputs_that_have_moved(pair):
    on_pair("prune")
    (pair / "base").rename(pair / "base-moved")
    assert "--base" in refused(fapm("verify", "out"))
    assert fapm("verify", "out", "--base", "base-moved").exit_code == 0
    assert refused(fapm("verify", "out", "--base", "finetuned"))


def test_demo_works_where_no_folder_is_named(pair):
    result = fapm("demo")
    assert result.exit_code == 0
    assert "kept ‖Δ‖²" in result.stdout
    assert fapm("verify", "fapm-demo/pruned").exit_code == 0


# Where the work is done.


@pytest.fixture
def addresses(monkeypatch):
    """The Ray addresses that a pool was asked for; the work is done in this process."""
    asked: list[str] = []

    def ray_pool(address):
        from fapm.run import in_process

        asked.append(address)
        return in_process

    module = types.ModuleType("fapm.cluster.pool")
    module.ray_pool = ray_pool  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fapm.cluster.pool", module)
    return asked


def test_the_flag_beats_the_recipe_and_the_recipe_the_environment(pair, addresses, monkeypatch):
    (pair / "r.yaml").write_text("ray: ray-in-recipe:1")
    assert "running in this process" in on_pair("prune", out="o0").stderr
    monkeypatch.setenv("RAY_ADDRESS", "ray-in-environment:1")
    assert "RAY_ADDRESS" in on_pair("prune", out="o1").stderr
    assert "ray in r.yaml" in on_pair("prune", "--config", "r.yaml", out="o2").stderr
    assert "--ray" in on_pair("prune", "--config", "r.yaml", "--ray", "local", out="o3").stderr
    assert "running in this process" in on_pair("prune", "--config", "r.yaml", "--ray", "off", out="o4").stderr
    (pair / "r.yaml").write_text("ray: off")  # which YAML reads as false
    assert "running in this process" in on_pair("prune", "--config", "r.yaml", out="o5").stderr
    assert addresses == ["ray-in-environment:1", "ray-in-recipe:1", "local"]


@pytest.mark.slow
def test_ray_gives_the_same_bytes(pair):
    assert on_pair("prune", "--shard-size", "4kB", out="here").exit_code == 0
    assert on_pair("prune", "--shard-size", "4kB", "--ray", "local", "--workers", "2", out="there").exit_code == 0
    assert weights_of(pair / "here") == weights_of(pair / "there")


# Terminals, signals, pipes.


def run_on_terminal(rows: int, columns: int, *args: str) -> tuple[int, str, bytes]:
    """Exit code, what a terminal at stderr shows, and stdout."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    running = process(*args, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            got = os.read(ours, 1 << 16)
        except OSError:  # how Linux says that the other end is closed
            break
        if not got:
            break
        shown += got
    os.close(ours)
    out, _ = running.communicate()
    return running.returncode, shown.decode(), out


@pytest.mark.parametrize(("rows", "columns"), [(24, 100), (0, 0)])  # 0 × 0: a terminal that does not know its size
def test_on_a_terminal_there_is_a_bar(pair, rows, columns):
    args = ["prune", "--base", "base", "--finetuned", "finetuned", "--out", "out", "--shard-size", "4kB", "--json"]
    code, shown, out = run_on_terminal(rows, columns, *args)
    assert code == 0
    nbytes = json.loads(out)["totals"]["read_bytes"]
    count = json.loads(out)["shards"]
    assert f"{nbytes / 1000:.1f}k/{nbytes / 1000:.1f}k" in shown
    assert f"shard {count}/{count}: 100%" in shown
    assert "B/s" in shown
    assert "[1/" not in shown


def test_ctrl_c_leaves_a_run_that_the_same_command_finishes(tmp_path):
    shapes = {f"t{i:03d}": (1024,) for i in range(150)}
    for role, tensors in zip(("base", "finetuned"), gaussian(shapes), strict=True):
        save(tmp_path / role, tensors)
    args = ["prune", "--base", "base", "--finetuned", "finetuned", "--shard-size", "4096", "--json"]
    running = process(*args, "--out", "out", cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stderr
    said = b""
    for line in running.stderr:
        if line.startswith(b"["):
            running.send_signal(signal.SIGINT)
            break
    out, said = running.communicate()
    assert running.returncode == 130
    assert out == b""
    assert said.splitlines()[-1] == b"fapm: stopped; the same command goes on from here"
    assert b"Traceback" not in said
    finished = len(list((tmp_path / "out").glob("*.safetensors")))
    assert 0 < finished < 150
    again = process(*args, "--out", "out", cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, said = again.communicate()
    assert again.returncode == 0
    assert json.loads(out)["resumed"] == finished
    assert f"going on: {finished} of 150 shards are finished".encode() in said
    assert f"[{finished + 1}/150] ".encode() in said
    other = process(*args, "--out", "other", cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    other.communicate()
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "other")


def test_a_reader_that_goes_away_is_no_error_to_speak_of(pair):
    ours, theirs = os.pipe()
    os.close(ours)
    running = process("inspect", "base", stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    _, said = running.communicate()
    assert said == b""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_byte_is_lost_between_threads():
    terminal = Terminal()
    with Progress(terminal) as progress:
        progress.count(8 * 20_000 * 3)
        threads = [threading.Thread(target=lambda: [progress.advance(3) for _ in range(20_000)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert "480k/480k" in terminal.getvalue()


def test_the_bar_follows_a_count_that_has_to_be_done_again(pair, monkeypatch):
    from fapm import Recipe, prune
    from fapm.scoring.threshold import HIGHEST_KEY, Bracket

    wrong = Bracket(HIGHEST_KEY - 5, HIGHEST_KEY)

    def first_brackets(plan, out, names):
        yield from ()
        return dict.fromkeys(names, wrong)

    monkeypatch.setattr("fapm.selection.first_brackets", first_brackets)
    sides = {side: str(pair / side) for side in ("base", "finetuned", "out")}
    terminal = Terminal()
    with Progress(terminal) as progress:
        result = prune(Recipe.of(**sides, scope="global", shard_size="4kB", workers=1), watch=progress.watch())
    assert result.manifest["rounds"] > 1
    total = f"{result.plan.pair_bytes * (1 + result.manifest['rounds']) / 1000:.1f}k"
    assert f"{total}/{total}" in terminal.getvalue()


# Help.


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command):
    result = fapm(command, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert f"\n    fapm {command}" in result.stdout


def test_help_names_every_command():
    assert all(f"\n  {command} " in fapm("--help").stdout for command in COMMANDS)


def loaded_by(*args: str) -> set[str]:
    """The modules that a command has loaded when it is done."""
    code = "import json, sys\nfrom fapm.cluster.cli import cli\ncli.main(sys.argv[1:], standalone_mode=False)\n"
    code += "print(); print(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        check=True,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("command", [[], *([c] for c in COMMANDS)])
def test_help_loads_nothing_heavy(command):
    assert not loaded_by(*command, "--help") & {"torch", "ray", "numba", "numpy", "pydantic", "pyarrow", "yaml", "tqdm"}


def test_help_comes_at_once():
    """In three times what Python takes to start with the library for command lines, in CPU seconds."""
    shown, started = [
        min(cpu_seconds([sys.executable, *arguments]) for _ in range(5))
        for arguments in (["-m", "fapm", "prune", "--help"], ["-c", "import click"])
    ]
    assert shown < 3 * started


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_reading_headers_loads_no_library_that_computes(pair, command):
    # For `plan` this needs fapm.scoring.device to load the engines late.
    options = ["--base", "base", "--finetuned", "finetuned", "--out", "out"] if command == "plan" else ["base"]
    assert not loaded_by(command, *options) & {"torch", "ray", "numba"}


def test_the_help_says_what_is_allowed():
    from fapm.recipe import Recipe, bounds

    shown = " ".join(fapm("prune", "--help-all").stdout.split())
    limited = [field for field in Recipe.model_fields if bounds(field)]
    sizes = ["shard_size", "memory", "device_memory"]
    assert limited == ["density", "strength", "tail", "rank", "seed", *sizes, "cpus_per_worker", "gpus_per_worker"]
    for field in limited:
        assert bounds(field) in shown, field


def test_exit_codes_say_whether_another_try_is_worth_it(pair, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")

    def no_room(*_: object) -> None:
        raise full

    monkeypatch.setattr("os.posix_fallocate", no_room)
    assert "no space left" in refused(on_pair("prune"), code=75)
    full.errno = errno.EACCES
    refused(on_pair("prune"), code=1)
    assert "no Ray cluster answers" in refused(on_pair("prune", "--ray", "127.0.0.1:1"), code=75)


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("ray", "[ray]", ("prune", "--ray", "local")),
        ("ray", "[ray]", ("submit",)),
        ("lightkube", "[kubernetes]", ("submit", "--kubernetes", "m.yaml")),
        ("numba", "", ("prune",)),
    ],
)
def test_what_is_not_installed_is_named(pair, module, extra, arguments):
    sides = ["--base", "base", "--finetuned", "finetuned", "--out", "out"]
    code = f"import sys\nsys.modules[{module!r}] = None\nfrom fapm.cluster.cli import main\nmain()"
    command = [sys.executable, "-c", code, *arguments, *sides]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    wanted = f"fapm: the Python module {module} is not installed; install it with: pip install 'fapm{extra}'"
    assert done.stderr.splitlines()[-1] == wanted


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "fapm" / "log.jsonl").read_text().splitlines()]


def test_the_log_tells_what_happened_to_each_shard_and_how_it_ended(pair):
    facts = json.loads(on_pair("prune", "--shard-size", "4kB", "--json").stdout)
    begun, *shards, finished = log_of(pair / "out")
    assert (begun["event"], begun["shards"], begun["resumed"]) == ("begun", facts["shards"], 0)
    assert sorted(line["shard"] for line in shards) == sorted(p.name for p in (pair / "out").glob("*.safetensors"))
    for line in shards:
        assert line["event"] == "shard"
        assert line["where"].endswith(f":{os.getpid()}")
        assert line["tries"] == 1
        assert line["seconds"] >= 0
    assert sum(line["read_bytes"] for line in shards) == facts["totals"]["read_bytes"]
    assert finished["event"] == "finished"
    assert [line["time"] for line in log_of(pair / "out")] == sorted(line["time"] for line in log_of(pair / "out"))
    before = (pair / "out" / "fapm" / "log.jsonl").read_bytes()
    assert on_pair("prune", "--shard-size", "4kB").exit_code == 0
    assert (pair / "out" / "fapm" / "log.jsonl").read_bytes() == before  # nothing was done


def test_the_log_keeps_what_failed(pair):
    broken = gaussian(MODEL_SHAPES)[1]
    broken["model.norm.weight"][0] = math.nan
    save(pair / "finetuned", broken)
    assert on_pair("prune").exit_code == 1
    assert [line["event"] for line in log_of(pair / "out")] == ["begun", "failed"]
    assert "model.norm.weight" in log_of(pair / "out")[-1]["error"]


def test_a_log_that_cannot_be_written_is_no_error(pair, monkeypatch):
    def refuse(*_: object) -> None:
        raise UserError("no")

    monkeypatch.setattr("fapm.storage.local.Folder.append", refuse)
    assert on_pair("prune").exit_code == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", ["report", "verify"])
def test_all_processes_that_read_the_table_end_well(pair, command):
    """pyarrow's reading threads aborted a third of them (exit 134) at their end: of 12 one would in all but 8 of a
    thousand runs."""
    assert on_pair("prune").exit_code == 0

    def run(_: int) -> int:
        return process(command, "out", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).wait()

    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(run, range(12))) == {0}


def test_plan_and_report_show_the_density_of_each_tensor(pair):
    rules = ("--rule", "*mlp*=0.05", "--rule", "lm_head.weight=0")
    planned = json.loads(on_pair("plan", "--json", *rules).stdout)["densities"]
    assert planned["lm_head.weight"] == 0
    assert {d for name, d in planned.items() if "mlp" in name} == {0.05}
    assert "0.05 for 5: model.layers.0.mlp.up.bias" in on_pair("plan", *rules).stdout
    assert on_pair("prune", *rules).exit_code == 0
    assert json.loads(fapm("report", "out", "--json").stdout)["densities"] == planned
    shown = fapm("report", "out").stdout
    assert "0.1 asked, others by rule" in shown
    assert "0 for 1: lm_head.weight" in shown
    assert "densities" not in on_pair("plan", out="other").stdout
