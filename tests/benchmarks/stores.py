"""A prune from and into an S3 server on this machine, against a plain client that moves the same bytes.

    python tests/benchmarks/stores.py [--layers 8] [--rounds 2]

Needs Ceph (`ceph` in tests/support/servers), whose one server shares the cores with all that is measured. The client
uses the same library: it reads both inputs by ranges of 16 MiB, eight at once, and uploads one output of that size in
parts, at the same time. Bytes and requests are counted by a proxy, in a run of their own. Hub to local: the server in
`hub` there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import obstore
import pytest
from llama_pair import make

sys.path += map(str, Path(__file__).parents[1].glob("support/**/"))
import ceph
import hub as hub_server
import s3
from faulty import proxy

from fapm import Recipe, prune
from fapm.storage.bucket import PART_BYTES, Bucket
from fapm.storage.hub import Repository, _client

RANGE = 16 << 20


def plain_copy(sources: list[tuple[Any, str, int]], target: tuple[Any, str] | None, size: int) -> float:
    """Seconds to read all sources and, at the same time, to upload `size` bytes, or write them to a local file."""
    ranges = [(client, key, i, min(RANGE, n - i)) for client, key, n in sources for i in range(0, n, RANGE)]

    def read(part: tuple[Any, str, int, int]) -> None:
        client, key, start, length = part
        assert len(obstore.get_range(client, key, start=start, length=length)) == length

    def write() -> None:
        piece = bytes(PART_BYTES)
        if target:
            with obstore.open_writer(*target, buffer_size=PART_BYTES, max_concurrency=4) as file:
                for start in range(0, size, PART_BYTES):
                    file.write(piece[: size - start])
            return
        with tempfile.TemporaryFile() as local:
            for start in range(0, size, PART_BYTES):
                local.write(piece[: size - start])
            local.flush()
            os.fsync(local.fileno())

    began = time.perf_counter()
    writing = threading.Thread(target=write)
    writing.start()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(read, ranges))
    writing.join()
    return time.perf_counter() - began


def timed(recipe: Recipe, client: Any = None) -> float:
    if client is not None:
        name, _, prefix = recipe.out.removeprefix("s3://").partition("/")
        for key in s3.names(client, recipe.out):
            client.delete_object(Bucket=name, Key=f"{prefix}/{key}")
    else:
        shutil.rmtree(recipe.out, ignore_errors=True)
    began = time.perf_counter()
    prune(recipe)
    return time.perf_counter() - began


SERVE = """
import pathlib, sys
sys.path.append("tests/support/servers")
import hub
with hub.served() as served:
    for side in ("base", "finetuned"):
        served.push(f"org/{side}", pathlib.Path(sys.argv[1], side))
    print(served.url, flush=True)
    sys.stdin.read()
"""


@contextmanager
def hub_of(folder: Path) -> Iterator[str]:
    """A Hub with the pair, in a process of its own: its Python is not to hold up ours."""
    command, root = [sys.executable, "-c", SERVE, str(folder)], Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdin
        yield process.stdout.readline().strip()
        process.stdin.close()


def show(what: str, pair: int, pruned: list[float], plain: list[float]) -> None:
    ratio = min(pruned) / min(plain)
    print(
        f"{what:34}{min(pruned):7.2f} s{pair / min(pruned) / 1e9:7.2f} GB/s{min(plain):9.2f} s plain{ratio:7.2f} ×",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    chosen = parser.parse_args()
    folder = Path(tempfile.gettempdir()) / f"fapm-benchmark-{chosen.layers}"
    make(folder, layers=chosen.layers)
    sizes = {side: (folder / side / "model.safetensors").stat().st_size for side in ("base", "finetuned")}
    pair, patch = sum(sizes.values()), pytest.MonkeyPatch()
    with ceph.gateway() as endpoint:
        client = s3.use(patch, endpoint, **ceph.KEYS, **s3.OLDER_SERVER)
        client.create_bucket(Bucket="bench")
        for side in sizes:
            client.upload_file(str(folder / side / "model.safetensors"), "bench", f"{side}/model.safetensors")
            client.upload_file(str(folder / side / "config.json"), "bench", f"{side}/config.json")
        far = {side: f"s3://bench/{side}" for side in sizes}
        store = Bucket("s3://bench/x").client
        sources = [(store, f"{side}/model.safetensors", size) for side, size in sizes.items()]
        out = sizes["finetuned"]
        for scope in ("tensor", "global"):
            recipe = Recipe.of(**far, out="s3://bench/out", scope=scope, device="cpu", memory="4GiB")
            pruned, plain = [], []
            for _ in range(chosen.rounds):
                plain.append(plain_copy(sources, (store, "copy"), out))
                client.delete_object(Bucket="bench", Key="copy")
                pruned.append(timed(recipe, client))
            show(f"S3 to S3, {scope}", pair, pruned, plain)
        with proxy(endpoint) as between:
            client = s3.use(patch, between.url, **ceph.KEYS, **s3.OLDER_SERVER)
            for scope in ("tensor", "global"):
                recipe = Recipe.of(**far, out="s3://bench/out", scope=scope, device="cpu", memory="4GiB")
                between.reset()
                timed(recipe, client)
                share, many = between.read / pair, between.requests / (pair / 1e9)
                print(f"  {scope}: {share:.3f} of the inputs' bytes read, {many:.0f} requests a GB of them", flush=True)
    s3.forget()
    with hub_of(folder) as url:
        hub_server.use(patch, url, folder / "home")
        recipe = Recipe.of(base="org/base", finetuned="org/finetuned", out=str(folder / "out"), device="cpu")
        pruned, plain = [], []
        for _ in range(chosen.rounds):
            sides = [Repository(f"hf://org/{side}") for side in sizes]
            stores = [_client(side.name, side._snapshot.commit) for side in sides]
            sources = [(client, "model.safetensors", size) for client, size in zip(stores, sizes.values(), strict=True)]
            plain.append(plain_copy(sources, None, out))
            pruned.append(timed(recipe))
        show("Hub to local, tensor", pair, pruned, plain)
        shutil.rmtree(folder / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
