"""What a checkpoint holds and where its bytes lie, read from headers alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.errors import UserError
from pipeline.formats.adapter import CONFIG, WEIGHTS, read_adapter, with_adapter
from pipeline.formats.beside import MAX_CONFIG_BYTES, MODEL_CONFIG, TOKENIZER, side_files_of
from pipeline.formats.delta import DELTA, check_base, in_layer, layered, patched, read_delta, shapes_of, summary
from pipeline.formats.header import MAX_HEADER_BYTES, Header, read_header
from pipeline.formats.names import packed_like, renamed, unwrapped
from pipeline.formats.pickled import describe, distributed_folder, torch_files
from pipeline.formats.quantized import dequantized
from pipeline.formats.tensor import Part, Side, TensorInfo, leaves
from pipeline.storage.address import open_store
from pipeline.storage.layers import Layers
from pipeline.storage.store import FileStat, Store, overlapped

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors files.

    Attributes:
        role: what the user calls it, `base` or `finetuned`.
        tensors: every tensor by name.
        identity: per file its size, time of change and a digest of its header: enough to notice that it is
            another file than it was.
        side_files: the small files that come along (configuration, tokenizer, templates).
        oddities: sentences worth showing to the user.
        borrowed: where those side files lie that are not in its folder.
        gone: stored tensors that are none of its own, and why: scales, say.
        stored: every tensor in its files, by whatever name and in whatever layout.
        quantized: its configuration speaks of codes, and its tensors are the weights that they stand for.
    """

    role: str
    folder: Store
    tensors: dict[str, TensorInfo]
    identity: dict[str, dict[str, Any]]
    side_files: tuple[str, ...]
    oddities: tuple[str, ...] = field(default=())
    borrowed: Mapping[str, Store] = field(default_factory=dict)
    gone: Mapping[str, str] = field(default_factory=dict)
    quantized: bool = False
    stored: tuple[TensorInfo, ...] = ()

    def read(self, name: str) -> bytes:
        """A side file."""
        return self.borrowed.get(name, self.folder).read(name)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())


def open_checkpoint(
    path: str, role: str, base: Checkpoint | None = None, renames: Sequence[str] = (), allow_pickle: bool = False,
    on_conflict: str = "error",
) -> Checkpoint:  # fmt: skip
    """Read the headers of the checkpoint in the folder `path`.

    Args:
        base: what an adapter is added to. Without it an adapter's own tensors are what is found.
        renames: FROM=TO, beginnings of base's names and the adapter's.
        allow_pickle: let another process look into pickles, if they are all that there is.
        on_conflict: what counts where several sparse task vectors do not agree: `first`, `last` or `error`.

    Raises:
        UserError: there is no such folder, it holds no weights, a shard is missing, or a header lies.
    """
    folder = open_store(path)
    if folder.is_file():
        raise UserError(f"{role}: {path} is a file; give the folder that holds it")
    if not folder.exists():
        raise UserError(f"{role}: there is no folder {path}")
    try:
        if isinstance(folder, Layers):
            return _of_layers(folder, role, base, renames, on_conflict)
        found = folder.files()
        top = {name for name in found if "/" not in name}
        pickled = _pickled(folder, top)
        if DELTA in top and MODEL not in top and INDEX not in top:
            return _of_delta(folder, found, role, base, renames)
        if pickled:
            read = _described(folder, *pickled, role, allow_pickle)
            oddities: list[str] = []
        else:
            read, oddities = _read_headers(folder, found, role)
        checkpoint = _opened(folder, found, read, role, oddities)
        is_adapter = WEIGHTS in checkpoint.identity
        return _with_adapter(checkpoint, base, renames) if is_adapter else _finished(checkpoint, base)
    finally:
        folder.close()


_Found = tuple[dict[str, TensorInfo], dict[str, dict[str, Any]]]
"""Tensors by name, and the identity of their files."""


def _read_headers(folder: Store, found: dict[str, FileStat], role: str) -> tuple[_Found, list[str]]:
    """What safetensors hold, and what is odd about it."""
    oddities: list[str] = []
    files, index = _weight_files(folder, {name for name in found if "/" not in name}, role, oddities)
    read = _headers_of(folder, files, found, role)
    _compare_with_index(index, read[0], role, oddities)
    return read, oddities


def _headers_of(folder: Store, files: Sequence[str], found: dict[str, FileStat], role: str) -> _Found:
    _stay_inside(folder, files, role)
    tensors: dict[str, TensorInfo] = {}
    identity = {}

    def read(name: str) -> Header:
        return read_header(folder.reader(name), name, f"{role}: {folder.at(name)}")

    for name, header in zip(files, overlapped(read, files, folder.reads_at_once), strict=True):
        for tensor in header.tensors:
            if tensor.name in tensors:
                raise UserError(
                    f"{role}: tensor {tensor.name!r} is in both {tensors[tensor.name].file} and {name} of "
                    f"{folder.address}; keep one copy, or an index that names the files that belong together"
                )
            tensors[tensor.name] = tensor
        identity[name] = {"size": found[name].size, **found[name].version, "header": header.digest}
    return tensors, identity


def _of_delta(
    folder: Store, found: dict[str, FileStat], role: str, base: Checkpoint | None, renames: Sequence[str]
) -> Checkpoint:
    """What base becomes with a sparse task vector; without base, what it holds."""
    where = f"{role}: {folder.address}"
    said = read_delta(folder, where)
    missing = [name for name in said["files"] if name not in found]
    if missing:
        raise UserError(f"{where}: {missing[0]} is missing; fetch the sparse task vector again")
    if role == "base":
        raise UserError(f"{where} holds a sparse task vector, which is no base; give it as --finetuned")
    read = _headers_of(folder, sorted(said["files"]), found, role)
    oddities = [f"{role}: {summary(said, sum(found[name].size for name in said['files']))}"]
    opened = _opened(folder, found, read, role, oddities)
    identity = {**opened.identity, DELTA: _identity_of(folder, DELTA)}
    wanted = shapes_of(said)
    if base is None:
        return replace(opened, tensors=wanted, identity=identity)
    check_base(said, base.identity, base.folder.address, where)
    named = packed_like(renamed(base.tensors, wanted, renames, []), wanted, [])
    return replace(opened, tensors=patched(said, read[0], named, folder, where), identity=identity)


def _of_layers(
    folder: Layers, role: str, base: Checkpoint | None, renames: Sequence[str], on_conflict: str
) -> Checkpoint:
    """What base becomes with several sparse task vectors, with the last one's side files."""
    opened = [open_checkpoint(part.address, role, base, renames) for part in folder.parts]
    for one in opened:
        if DELTA not in one.identity:
            raise UserError(f"{role}: {one.folder.address} holds no sparse task vector, and only those can be several")
    layers = [{n: in_layer(info, i) for n, info in one.tensors.items()} for i, one in enumerate(opened)]
    tensors, beaten = layered(layers, on_conflict, role)
    last = opened[-1]
    parts = [leaf.info.name for info in beaten for leaf in leaves(Part("finetuned", info)) if leaf.side == "finetuned"]
    return Checkpoint(
        role, folder, tensors, {f"{i}/{file}": of for i, one in enumerate(opened) for file, of in one.identity.items()},
        last.side_files, tuple(oddity for one in opened for oddity in one.oddities),
        borrowed=dict.fromkeys(last.side_files, last.folder),
        gone=dict.fromkeys(parts, "another sparse task vector's counts"),
        stored=tuple(in_layer(info, i) for i, one in enumerate(opened) for info in one.stored),
    )  # fmt: skip


def _stay_inside(folder: Store, names: Iterable[str], role: str) -> None:
    for name in names:
        if folder.leads_out(name):
            raise UserError(
                f"{role}: {folder.at(name)} is a link out of its folder; put the file itself there, or give the folder "
                "in which it lies"
            )


def _opened(folder: Store, found: dict[str, FileStat], read: _Found, role: str, oddities: list[str]) -> Checkpoint:
    tensors, identity = read
    side_files, left = side_files_of(found)
    _stay_inside(folder, (*identity, *side_files), role)
    size = found[MODEL_CONFIG].size if MODEL_CONFIG in found else 0
    if size > MAX_CONFIG_BYTES:
        raise UserError(f"{role}: {folder.at(MODEL_CONFIG)} has {size} bytes, more than any configuration")
    left = [name for name in left if name not in identity]
    if left:
        oddities.append(f"{role}: weights in sub-folders or other formats are not looked at: {', '.join(left[:5])}")
    stored = tuple(leaf.info for info in tensors.values() for leaf in leaves(Part(_side(role), info)))
    bare = unwrapped(tensors, role, oddities)
    return Checkpoint(role, folder, bare, identity, side_files, tuple(oddities), stored=stored)


def _finished(checkpoint: Checkpoint, base: Checkpoint | None) -> Checkpoint:
    """The same with the weights that codes stand for, and with base's side files where it has no configuration."""
    if base and MODEL_CONFIG not in checkpoint.side_files and MODEL_CONFIG in base.side_files:
        borrowed = {name: base.folder for name in base.side_files if name not in checkpoint.side_files}
        side_files = tuple(sorted({*checkpoint.side_files, *borrowed}))
        said = f"{checkpoint.role} has no {MODEL_CONFIG}: base's is taken, with the files beside it"
        oddities = (*checkpoint.oddities, said)
        checkpoint = replace(checkpoint, side_files=side_files, borrowed=borrowed, oddities=oddities)
    return _with_weights(checkpoint)


def _pickled(folder: Store, top: set[str]) -> tuple[str, list[str]] | None:
    """Which kind of pickles a folder has and no safetensors, and which."""
    if any(name.endswith(".safetensors") for name in top):
        return None
    files = torch_files(top)
    if files:
        return "torch", files
    inside = distributed_folder(folder)
    return ("dcp", [inside]) if inside else None


def _described(folder: Store, kind: str, names: list[str], role: str, allow_pickle: bool) -> _Found:
    where = f"{role}: {folder.address}"
    if not allow_pickle:
        what = "a distributed checkpoint" if kind == "dcp" else f"only {names[0]}"
        raise UserError(
            f"{where} is {what}, which is described by pickles; --allow-pickle looks into them, in a process without "
            "network that can write nothing"
        )
    side = _side(role)
    tensors: dict[str, TensorInfo] = {}
    for info in describe(folder, kind, names, side, where):
        if info.name in tensors:
            raise UserError(f"{where}: tensor {info.name!r} is there twice")
        tensors[info.name] = info
    if not tensors:
        raise UserError(f"{where}: no tensors are in {names[0]}")
    stored = folder.files()
    parts: dict[str, list[tuple[object, ...]]] = {}
    for name, info in sorted(tensors.items()):
        for part in leaves(Part(side, info)):
            inner = part.info
            parts.setdefault(inner.file, []).append((name, inner.dtype, inner.shape, inner.offset, inner.nbytes))
    identity = {
        file: {"size": stored[file].size, **stored[file].version, "header": _digest(repr(parts[file]).encode())}
        for file in sorted(parts)
    }
    return tensors, identity


def _with_weights(checkpoint: Checkpoint) -> Checkpoint:
    """The same with the weights that its codes stand for, if it is quantized."""
    where = f"{checkpoint.role}: {checkpoint.folder.address}"
    tensors, gone = dequantized(checkpoint.tensors, read_config(checkpoint), _side(checkpoint.role), where)
    if not gone:
        return checkpoint
    many = sum(info.form is not None for info in tensors.values())
    said = f"{checkpoint.role}: {many} quantized tensor(s) are taken as the bfloat16 that they stand for"
    identity = {**checkpoint.identity}
    if MODEL_CONFIG in checkpoint.side_files:
        identity[MODEL_CONFIG] = _identity_of(checkpoint.folder, MODEL_CONFIG)
    oddities = (*checkpoint.oddities, said)
    return replace(checkpoint, tensors=tensors, gone=gone, identity=identity, oddities=oddities, quantized=True)


def _side(role: str) -> Side:
    """The side on which forms find a checkpoint; one that is only looked at is on either."""
    return "base" if role == "base" else "finetuned"


def _identity_of(folder: Store, name: str) -> dict[str, Any]:
    """What tells a small file that decides what weights mean from another."""
    stat = folder.files()[name]
    return {"size": stat.size, **stat.version, "header": _digest(folder.read(name))}


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json, or nothing if there is none or it is none."""
    if MODEL_CONFIG not in checkpoint.side_files:
        return {}
    try:
        config = json.loads(checkpoint.read(MODEL_CONFIG))
    except (ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _with_adapter(adapter: Checkpoint, base: Checkpoint | None, renames: Sequence[str]) -> Checkpoint:
    """base with an adapter: base's tensors and side files, and what the adapter brings of its own."""
    folder, where = adapter.folder, f"{adapter.role}: {adapter.folder.address}"
    if adapter.role == "base":
        raise UserError(f"{where} holds a LoRA adapter, which is no base; give it as --finetuned")
    if not folder.has(CONFIG):
        raise UserError(f"{where} holds a LoRA adapter without its {CONFIG}")
    if folder.size(CONFIG) > MAX_CONFIG_BYTES:
        raise UserError(f"{where}: {CONFIG} has {folder.size(CONFIG)} bytes, more than any configuration")
    said = read_adapter(folder.read(CONFIG), where)
    identity = {**adapter.identity, CONFIG: _identity_of(folder, CONFIG)}
    if base is None:
        return replace(adapter, identity=identity)
    oddities = [*adapter.oddities]
    tensors = with_adapter(said, adapter.tensors, base.tensors, renames, where, oddities)
    own = [name for name in adapter.side_files if name not in (CONFIG, "README.md") and name.startswith(TOKENIZER)]
    borrowed = {name: base.folder for name in base.side_files if name not in own}
    oddities.append(f"{adapter.role}: an adapter; what base becomes with it is formed while it is read")
    side_files = tuple(sorted({*own, *borrowed}))
    return replace(
        adapter,
        tensors=tensors,
        identity=identity,
        side_files=side_files,
        oddities=tuple(oddities),
        borrowed=borrowed,
        quantized=base.quantized,
    )


def _weight_files(
    folder: Store, top: set[str], role: str, oddities: list[str]
) -> tuple[list[str], dict[str, str] | None]:
    """The safetensors files that make up the checkpoint, and the index's weight map if there is an index."""
    weights = sorted(name for name in top if name.endswith(".safetensors"))
    indices = sorted(name for name in top if name.endswith(INDEX_SUFFIX))
    if len(indices) > 1:
        raise UserError(f"{role}: {folder.address} has several indices ({', '.join(indices)}); keep one")
    if indices:
        weight_map = _read_index(folder, indices[0], role)
        files = sorted(set(weight_map.values()))
        missing = [name for name in files if "/" in name or name not in top]
        if missing:
            raise UserError(
                f"{role}: {indices[0]} names {len(missing)} file(s) that {folder.address} does not have: "
                f"{', '.join(map(repr, missing[:3]))}; fetch the checkpoint again"
            )
        _mention_ignored(weights, files, role, oddities)
        return files, weight_map
    if "model.safetensors" in weights:
        _mention_ignored(weights, ["model.safetensors"], role, oddities)
        return ["model.safetensors"], None
    parts = [name for name in weights if not name.startswith("consolidated")] or weights
    if not parts:
        others = sorted(n for n in top if n.endswith((".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")))
        why = f"only {others[0]}, which is not read; save it as safetensors first" if others else "no safetensors"
        raise UserError(f"{role}: no checkpoint in {folder.address}: it has {why}")
    if len(parts) > 1:
        oddities.append(f"{role}: {len(parts)} safetensors files and no index; all of them are taken")
    _mention_ignored(weights, parts, role, oddities)
    return parts, None


def _mention_ignored(weights: list[str], taken: list[str], role: str, oddities: list[str]) -> None:
    ignored = [name for name in weights if name not in taken]
    if ignored:
        oddities.append(f"{role}: not part of the checkpoint and ignored: {', '.join(ignored[:5])}")


def _read_index(folder: Store, name: str, role: str) -> dict[str, str]:
    if folder.leads_out(name) or folder.size(name) > MAX_HEADER_BYTES:
        raise UserError(f"{role}: {folder.at(name)} is a link out of its folder, or larger than any index")
    try:
        weight_map: dict[str, str] = json.loads(folder.read(name))["weight_map"]
        if not weight_map or not all(isinstance(k, str) and isinstance(v, str) for k, v in weight_map.items()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{role}: {folder.at(name)} is not an index with a weight_map of names to files") from None
    return weight_map


def _compare_with_index(
    index: dict[str, str] | None, tensors: dict[str, TensorInfo], role: str, oddities: list[str]
) -> None:
    if index is None:
        return
    for names, what in (
        ([n for n in index if n not in tensors], "is named by the index and in none of its files"),
        ([n for n in tensors if n not in index], "is in a file and not in the index; it is taken"),
        ([n for n, t in tensors.items() if index.get(n, t.file) != t.file], "is in another file than the index says"),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            oddities.append(f"{role}: tensor {names[0]!r}{more} {what}")
