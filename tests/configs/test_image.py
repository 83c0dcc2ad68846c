"""configs/Dockerfile: nothing here builds images, so its steps are run one by one in a new environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "configs" / "Dockerfile"
TORCH_INDEX = "https://pypi.org/simple"


def steps() -> list[tuple[str, str]]:
    """The instructions and what they say."""
    text = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


def test_it_is_slim_pinned_and_nobody_in_particular():
    found = steps()
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", found[0][1])
    assert ("ARG", "ACCELERATOR=cpu") in found
    assert [said for step, said in found if step == "USER"] == ["1000"]
    [torch] = re.findall(r"torch==([\d.]+)", DOCKERFILE.read_text())
    readme = (ROOT / "README.md").read_text()
    assert f"torch=={torch}" in readme
    lines = (ROOT / "configs" / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.+-]+", line) for line in lines if line and not line.startswith("#"))


def test_what_is_pinned_is_what_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["ray"], *extras["kubernetes"], *extras["s3"]]
    names = {re.split(r"[\[><=]", requirement)[0].lower() for requirement in wanted} - {"torch"}
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "configs/requirements.txt").read_text().splitlines()}
    assert names <= pinned


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    """A folder with `environment`, in which every step of pip was run, and `opt`, in which what is copied lies."""
    folder = Path(tempfile.mkdtemp(prefix="fapm-image-", dir="/var/tmp"))  # /tmp will be another one
    opt = folder / "opt"
    opt.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(folder / "environment")], check=True)
    path = f"{folder / 'environment' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "TORCH_INDEX": TORCH_INDEX, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("PYTHONPATH", None)
    try:
        for step, said in steps():
            if step == "COPY":
                *sources, _ = said.split()
                for source in sources:
                    copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                    copy(ROOT / source, opt / Path(source).name)
            elif step == "RUN" and said.startswith("pip "):
                done = subprocess.run(["bash", "-euc", said], cwd=opt, env=environment, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr[-2000:]
            elif step == "RUN" and said.startswith("apt-get "):
                packages = re.findall(r"--no-install-recommends ([\w -]+?) &&", said)[0].split()
                # A test does not change the machine that it runs on: only whether Debian has them.
                subprocess.run(["apt-get", "--simulate", "-qq", "install", *packages], check=True)
            else:
                assert step in ("FROM", "ARG", "WORKDIR", "USER", "ENV", "CMD") or said.startswith("useradd "), step
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# As a pod has it: nothing can be written but /tmp, /dev/shm and the models, and no right is left beyond a user's own.
AS_A_POD = """
set -eu
mount --make-rprivate /
mount --bind "$MODELS" "$MODELS"
mount -o remount,ro,bind /
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /dev/shm
! touch /written 2> /dev/null
exec setpriv --no-new-privs --inh-caps=-all --bounding-set=-all "$@"
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not shutil.which("apt-get") or os.getuid() != 0, reason="wants Debian, and root to take rights away"
)
def test_its_steps_make_an_environment_that_prunes_where_only_tmp_can_be_written(image):
    models = image / "models"
    models.mkdir()
    path = f"{image}/environment/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    environment = {
        "PATH": path,
        "HOME": "/tmp",
        "NUMBA_CACHE_DIR": "/tmp/numba",
        "LANG": "C.UTF-8",
        "MODELS": str(models),
    }

    def run(*words: str) -> str:
        pod = ["unshare", "--mount", "bash", "-c", AS_A_POD, "pod", *words]
        done = subprocess.run(pod, cwd=models, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert run("fapm", "--version").startswith("fapm ")
    assert "are the int(0.1 · n) highest-scored of each tensor" in run("fapm", "demo", f"{models}/demo")
    sides = [f"--{side}={models}/demo/{side}" for side in ("base", "finetuned")]
    assert "with 1 worker" in run("fapm", "prune", *sides, f"--out={models}/out", "--ray=local", "--workers=1")
    assert "all checksums are as they should be" in run("fapm", "verify", f"{models}/out")
    for module in ("fapm.cluster.job", "fapm.cluster.kubernetes"):
        run("python", "-c", f"import {module}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_installed_is_one_package_that_no_folder_of_the_user_hides(image, tmp_path):
    """Nothing but `fapm` and what describes it; it works beside modules with names that our folders have."""
    [site] = (image / "environment").glob("lib/python*/site-packages")
    [about] = site.glob("fapm-*.dist-info")
    installed = {line.partition(",")[0] for line in (about / "RECORD").read_text().splitlines()}
    files = {name for name in installed if not name.startswith(("../", f"{about.name}/")) and "__pycache__" not in name}
    ours = {"pipeline": Path("fapm"), "cluster": Path("fapm/cluster")}
    there = {
        str(name / path.relative_to(ROOT / folder))
        for folder, name in ours.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files == there
    for name in ("pipeline", "cluster", "configs", "tests", "docs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('this is the {name} of the user')")
    python = image / "environment" / "bin" / "python"
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    sides = ["--base", "demo/base", "--finetuned", "demo/finetuned"]
    code = "from fapm import Recipe, prune; prune(Recipe(base='demo/base', finetuned='demo/finetuned', out='out'))"
    for command in (
        ["-m", "fapm", "demo", "demo"],
        ["-m", "fapm", "prune", *sides, "--out", "on-ray", "--ray", "local", "--workers", "1"],
        ["-c", code],
    ):
        done = subprocess.run([python, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    pruned = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("demo/pruned", "out", "on-ray")]
    assert pruned[0] == pruned[1] == pruned[2]
