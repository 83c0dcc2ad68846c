"""Small checkpoints for the tests: written by the safetensors library or, where it would refuse, by hand."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def save(folder: Path, tensors: Tensors, shards: int = 1, config: dict | None = None) -> Path:
    """Write a checkpoint as Hugging Face libraries do; tensors are dealt out over the shards in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config if config is not None else {"model_type": "test"}))
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def save_pair(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16) -> Path:
    """base/ and finetuned/ of random tensors, in a folder."""
    for side, tensors in zip(("base", "finetuned"), gaussian(shapes, dtype), strict=True):
        save(folder / side, tensors)
    return folder


def load(folder: Path) -> Tensors:
    """Every tensor of a checkpoint, read by the safetensors library through the index if there is one."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        files = ["model.safetensors"]
    else:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
    found: Tensors = {}
    for file in files:
        with safe_open(folder / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118
                assert not index.exists() or weight_map[name] == file
                assert name not in found
                found[name] = opened.get_tensor(name)
    if index.exists():
        assert found.keys() == weight_map.keys()
        stored = json.loads(index.read_text())["metadata"]["total_size"]
        assert stored == sum(t.nbytes for t in found.values())
    return found


def weights_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every safetensors file and index of a folder."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]
    return {f.name: f.read_bytes() for f in sorted(files)}


def digests(folder: Path) -> dict[str, str]:
    """The same as digests, for large ones."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files)}


def raw_file(path: Path, header: dict | bytes, data: bytes, length: int | None = None) -> Path:
    """A file with any header at all, `length` being what it claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def raw_tensors(path: Path, tensors: list[tuple[str, str, list[int], bytes]]) -> Path:
    """A file with tensors at exactly the given order, so that they may be unaligned."""
    header, position = {}, 0
    for name, dtype, shape, data in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    return raw_file(path, header, b"".join(data for *_, data in tensors))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bits (NaN and −0 included)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bytes_of(a) == bytes_of(b)


def bytes_of(t: torch.Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""


def gaussian(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0, delta: float = 0.02
) -> tuple[Tensors, Tensors]:
    """base N(0, 1) and finetuned = base + N(0, delta²), rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    base, finetuned = {}, {}
    for name, shape in shapes.items():
        p = torch.randn(shape, generator=generator)
        base[name] = p.to(dtype)
        finetuned[name] = (p + delta * torch.randn(shape, generator=generator)).to(dtype)
    return base, finetuned


def coarse(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensors, Tensors]:
    """Weights of few values, zero among them: most scores are shared by many elements."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([-1.0, -0.5, 0.0, 0.0, 0.5, 1.0, 2.0])
    sides: tuple[Tensors, Tensors] = ({}, {})
    for name, shape in shapes.items():
        for side in sides:
            picked = torch.randint(0, len(values), (math.prod(shape),), generator=generator)
            side[name] = values[picked].reshape(shape).to(dtype)
    return sides


MODEL_SHAPES = {
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.mlp.up.weight": (33, 16),
    "model.layers.0.mlp.up.bias": (33,),
    "model.layers.0.norm.weight": (16,),
    "model.layers.1.mlp.up.weight": (33, 16),
    "model.layers.1.mlp.up.bias": (33,),
    "model.layers.1.norm.weight": (16,),
    "model.layers.10.mlp.up.weight": (33, 16),
    "model.layers.10.experts.0.w1.weight": (7, 9),
    "model.layers.10.experts.1.w1.weight": (7, 9),
    "model.norm.weight": (16,),
    "lm_head.weight": (40, 16),
}
"""A little of everything that layer scope has to tell apart."""
