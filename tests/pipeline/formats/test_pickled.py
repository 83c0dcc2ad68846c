"""pytest tests/pipeline/formats/test_pickled.py: pickled checkpoints, read where they lie, by torch's own writers."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from checkpoints import digests, load, save, save_pair
from needs import ROOMS

from fapm import Recipe, UserError, prune
from fapm.checking.verify import verify
from fapm.formats import sandbox
from fapm.formats.checkpoint import open_checkpoint

SHAPES = {"model.embed.weight": (40, 8), "model.layers.0.q.weight": (8, 16), "norm": (5,), "empty": (0, 3), "one": ()}


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    return save_pair(tmp_path, SHAPES)


def pruned(folder: Path, finetuned: str, **choices: Any) -> tuple[dict[str, str], Any]:
    out = folder / f"of-{finetuned}"
    sides = {"base": str(folder / "base"), "finetuned": str(folder / finetuned), "out": str(out)}
    result = prune(Recipe.of(**sides, density=0.3, device="cpu", workers=1, **choices))
    assert verify(str(out)) == []
    return {name: digest for name, digest in digests(out).items() if name.endswith(".safetensors")}, result


def torch_saved(
    folder: Path, tensors: dict[str, torch.Tensor], name: str = "pytorch_model.bin", wrap: str = ""
) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    torch.save({wrap: tensors} if wrap else tensors, folder / name)


@pytest.mark.parametrize(
    ("name", "wrap"), [("pytorch_model.bin", ""), ("pytorch_model_fsdp.bin", "state_dict"), ("model.pt", "model")]
)
def test_torch_saved_is_read_where_it_lies(pair, name, wrap):
    torch_saved(pair / "pickled", load(pair / "finetuned"), name, wrap)
    found, result = pruned(pair, "pickled", allow_pickle=True)
    assert found == pruned(pair, "finetuned")[0]
    assert all(info.form is None for info in result.plan.finetuned.tensors.values())


def test_in_several_files_and_with_tensors_that_share_their_bytes(pair):
    tensors = load(pair / "finetuned") | {"tied": load(pair / "finetuned")["model.embed.weight"]}
    tensors["tied"] = tensors["model.embed.weight"]
    save(pair / "finetuned", {name: t.clone() for name, t in tensors.items()})
    names = list(tensors)
    torch_saved(pair / "pickled", {n: tensors[n] for n in names[::2]}, "pytorch_model-00001-of-00002.bin")
    torch_saved(pair / "pickled", {n: tensors[n] for n in names[1::2]}, "pytorch_model-00002-of-00002.bin")
    found = pruned(pair, "pickled", allow_pickle=True, unpaired="pass")[0]
    assert found == pruned(pair, "finetuned", unpaired="pass")[0]


def test_as_base_too_and_as_transformers_used_to_write_it(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "pickled").mkdir()
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    sides = {"base": str(tmp_path / "pickled"), "finetuned": str(tmp_path / "base"), "out": str(tmp_path / "out")}
    prune(Recipe.of(**sides, density=0.0, device="cpu", workers=1, allow_pickle=True))
    assert verify(str(tmp_path / "out")) == []
    for name, tensor in load(tmp_path / "base").items():
        assert torch.equal(load(tmp_path / "out")[name], tensor)


def test_nothing_is_unpickled_unless_it_is_allowed(pair):
    torch_saved(pair / "pickled", load(pair / "finetuned"))
    with pytest.raises(UserError, match=r"is only pytorch_model\.bin, which is described by pickles; --allow-pickle"):
        pruned(pair, "pickled")
    dcp.save({"model": load(pair / "finetuned")}, checkpoint_id=pair / "dcp", no_dist=True)
    with pytest.raises(UserError, match="is a distributed checkpoint, which is described by pickles; --allow-pickle"):
        pruned(pair, "dcp")


def test_safetensors_beside_it_are_taken(pair):
    torch.save({"x": 1}, pair / "finetuned" / "pytorch_model.bin")
    assert pruned(pair, "finetuned")[0]


# Distributed checkpoints.


@pytest.mark.parametrize(("key", "inside"), [("", ""), ("model", "pytorch_model_fsdp_0")])
def test_a_distributed_checkpoint(pair, key, inside):
    """Optimizer states lie beside the model, and nothing else does."""
    tensors = load(pair / "finetuned")
    state = {key: tensors, "optim": {"step": 3, "exp_avg": tensors}} if key else tensors
    dcp.save(state, checkpoint_id=pair / "dcp" / inside, no_dist=True)
    (pair / "base" / "generation_config.json").write_text("{}")
    found, result = pruned(pair, "dcp", allow_pickle=True)
    assert found == pruned(pair, "finetuned")[0]
    assert (pair / "of-dcp" / "config.json").read_bytes() == (pair / "base" / "config.json").read_bytes()
    assert (pair / "of-dcp" / "generation_config.json").exists()
    assert "finetuned has no config.json: base's is taken, with the files beside it" in result.plan.warnings


def sharded(rank: int, world: int, folder: Path, columns: bool) -> None:
    """One rank's part of FSDP's or of a tensor-parallel checkpoint, in a process of its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    shape = (world // 2, 2) if columns else (world,)
    mesh = init_device_mesh("cpu", shape)
    placed = [Shard(0), Shard(1)] if columns else [Shard(0)]
    state = {
        name: distribute_tensor(tensor, mesh, placed if tensor.ndim == 2 else [Shard(0)] * mesh.ndim)
        if tensor.numel() > 1 and (tensor.ndim == 2 or not columns)
        else tensor
        for name, tensor in load(folder / "finetuned").items()
    }
    dcp.save({"model": state}, checkpoint_id=folder / "dcp")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "rows and columns"])
def test_what_several_ranks_have_written(pair, columns):
    """Sizes that do not divide evenly; the ranks' parts are put together where they are read."""
    save_pair(pair, {"a": (41, 8), "b": (7, 19), "c": (300, 257), "norm": (5,)})
    code = (
        "import sys; sys.path[:0] = sys.argv[5:]; from pathlib import Path; import test_pickled as t;"
        "t.sharded(int(sys.argv[1]), int(sys.argv[4]), Path(sys.argv[2]), sys.argv[3] == 'True')"
    )
    here = Path(__file__)
    count = 4 if columns else 2
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(pair), str(columns), str(count), str(here.parent), *ROOMS],
            cwd=here.parents[3],
        )
        for rank in range(count)
    ]
    assert [rank.wait() for rank in ranks] == [0] * count
    assert len(list((pair / "dcp").glob("*.distcp"))) == count
    found, result = pruned(pair, "dcp", allow_pickle=True, memory="64MiB")
    assert found == pruned(pair, "finetuned")[0]
    assert result.plan.finetuned.tensors["c"].form is not None


# What is hostile.


class Writes:
    """Pickles that do something when they are read."""

    def __init__(self, call: Any, *args: Any):
        self._what = call, args

    def __reduce__(self) -> Any:
        return self._what


@pytest.mark.parametrize("kind", ["torch", "dcp"])
def test_what_a_pickle_asks_for_is_not_done(tmp_path, kind):
    path, mark = tmp_path / "checkpoint", tmp_path / "was here"
    path.mkdir()
    evil = Writes(os.system, f"touch '{mark}'")
    if kind == "torch":
        torch.save({"a": evil}, path / "pytorch_model.bin")
    else:
        (path / ".metadata").write_bytes(pickle.dumps(evil))
    with pytest.raises(UserError, match="cannot be read safely"):
        open_checkpoint(str(path), "base", allow_pickle=True)
    assert not mark.exists()


ATTEMPTS = {
    "write": "open(sys.argv[1] + '/new', 'w')",
    "append": "open(sys.argv[1] + '/there', 'a')",
    "os.open": "os.open(sys.argv[1] + '/new', os.O_CREAT)",
    "remove": "os.remove(sys.argv[1] + '/there')",
    "rename": "os.rename(sys.argv[1] + '/there', sys.argv[1] + '/new')",
    "link": "os.symlink('/etc/passwd', sys.argv[1] + '/new')",
    "folder": "os.mkdir(sys.argv[1] + '/new')",
    "mode": "os.chmod(sys.argv[1] + '/there', 0o777)",
    "times": "os.utime(sys.argv[1] + '/there')",
    "truncate": "os.truncate(sys.argv[1] + '/there', 0)",
    "program": "os.execv('/bin/true', ['true'])",
    "subprocess": "subprocess.run(['/bin/true'])",
    "network": "socket.create_connection(('127.0.0.1', int(sys.argv[2])))",
    "signal": "os.kill(os.getppid(), 15)",
}


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")
@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_even_what_runs_there_can_do_nothing(tmp_path, attempt):
    (tmp_path / "there").write_text("as before")
    before = (tmp_path / "there").stat()
    server = socket.create_server(("127.0.0.1", 0))
    code = (
        f"import os, socket, subprocess, sys\nsys.path[:0] = [{str(Path(sandbox.__file__).parent)!r}]\n"
        "import sandbox\nsandbox.give_up_the_world()\nassert open(sys.argv[1] + '/there').read() == 'as before'\n"
        f"try:\n    {ATTEMPTS[attempt]}\nexcept PermissionError:\n    print('refused')\n"
    )
    command = [sys.executable, "-I", "-S", "-c", code, str(tmp_path), str(server.getsockname()[1])]
    done = subprocess.run(command, capture_output=True, text=True)
    server.close()
    assert (done.stdout, done.stderr) == ("refused\n", "")
    assert os.listdir(tmp_path) == ["there"]
    after = (tmp_path / "there").stat()
    assert (after.st_mtime_ns, after.st_mode, after.st_size) == (before.st_mtime_ns, before.st_mode, before.st_size)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cannot be read safely"),
        (lambda path: path.write_bytes(b""), "cannot be read safely"),
        (lambda path: path.write_bytes(b"\x80\x04."), "cannot be read safely"),
        (lambda path: torch.save([1, 2], path), "holds no tensors by name"),
        (lambda path: torch.save({"a": torch.ones(2, 3).t()}, path), "it is not stored in its own order"),
        (lambda path: torch.save({"a": torch.ones(2, dtype=torch.complex64)}, path), "its dtype is complex64"),
        (lambda path: torch.save({"a\x1b[31m": torch.ones(2)}, path), "a tensor is named"),
        (lambda path: torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False), "old format"),
        (lambda path: torch.save({}, path), "no tensors are in pytorch_model.bin"),
    ],
)
def test_what_is_no_such_checkpoint_is_said(tmp_path, change, said):
    torch_saved(tmp_path / "c", {"a": torch.ones(3, 4)})
    change(tmp_path / "c" / "pytorch_model.bin")
    with pytest.raises(UserError) as error:
        open_checkpoint(str(tmp_path / "c"), "base", allow_pickle=True)
    assert said in str(error.value)
    assert "\x1b" not in str(error.value)


def test_a_description_that_lies_about_its_files(tmp_path):
    dcp.save({"a": torch.ones(30, 4)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    path = tmp_path / "dcp" / ".metadata"
    whole = path.read_bytes()
    (tmp_path / "secret").write_bytes(b"x" * 10_000)
    for before, after in ((b"__0_0.distcp", b"../secret\x00\x00\x00"), (b"__0_0.distcp", b"__9_9.distcp")):
        path.write_bytes(whole.replace(before, after))
        with pytest.raises(UserError, match="cannot be read safely"):
            open_checkpoint(str(tmp_path / "dcp"), "base", allow_pickle=True)


def test_the_recipe_remembers_it_and_a_changed_file_is_noticed(pair):
    torch_saved(pair / "pickled", load(pair / "finetuned"))
    pruned(pair, "pickled", allow_pickle=True)
    made = json.loads((pair / "of-pickled" / "fapm" / "manifest.json").read_text())
    assert made["recipe"]["allow_pickle"] is True
    torch_saved(pair / "pickled", {name: t * 2 for name, t in load(pair / "finetuned").items()})
    with pytest.raises(UserError, match=r"pytorch_model\.bin has changed since"):
        pruned(pair, "pickled", allow_pickle=True)


def with_pickle(path: Path, pieces: Iterable[bytes]) -> None:
    """A file of torch.save with another pickle, deflated."""
    torch.save({"a": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as whole:
        stored = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in stored.items():
            with made.open(name, "w", force_zip64=True) as file:
                for piece in pieces if name.endswith("data.pkl") else [data]:
                    file.write(piece)


def texts(count: int) -> Iterator[bytes]:
    """A list of texts of 64 kB."""
    yield b"\x80\x02(l"
    for _ in range(count):
        yield b"X\x00\x00\x01\x00" + b"a" * 65536 + b"a"
    yield b"."


def many_names(path: Path) -> None:
    """More than an answer may hold."""
    one = torch.ones(1)
    torch.save({f"{i:07d}{'n' * 900}": one for i in range(100_000)}, path)


GROWING = {
    "zeros": lambda path: with_pickle(path, (bytes(1 << 20) for _ in range(3000))),
    "texts": lambda path: with_pickle(path, texts(40_000)),
    "names": many_names,
}
OPENED = """
import resource, sys
from fapm.errors import UserError
from fapm.formats.checkpoint import open_checkpoint
try:
    open_checkpoint(sys.argv[1], "base", allow_pickle=True)
except UserError as error:
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, error)
"""


@pytest.mark.parametrize("what", GROWING)
def test_a_pickle_that_grows_is_refused_in_little_memory(tmp_path, what):
    torch_saved(tmp_path / "c", {"a": torch.ones(3, 4)})
    usual = fresh(OPENED + "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)", str(tmp_path / "c"))
    GROWING[what](tmp_path / "c" / "pytorch_model.bin")
    kilobytes, said = fresh(OPENED, str(tmp_path / "c")).split(" ", 1)
    assert "cannot be read safely" in said
    assert int(kilobytes) - int(usual.split()[0]) < 600_000


def fresh(code: str, *words: str) -> str:
    """What Python says. A shell starts it: a process's peak is at least that of the one that has started it."""
    command = ["sh", "-c", '"$@"; true', "sh", sys.executable, "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
