"""Checkpoints: the tensors they hold and where their bytes lie, read from headers alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fapm.errors import UserError
from fapm.formats.adapter import (
    CONFIG,
    PICKLED,
    WEIGHTS,
    of_training,
    read_adapter,
    unmerged,
    with_adapter,
    without_tied_head,
)
from fapm.formats.configuration import ties
from fapm.formats.delta import DELTA, check_base, in_layer, layered, patched, read_delta, shapes_of, summary
from fapm.formats.header import MAX_HEADER_BYTES, Header, read_header
from fapm.formats.names import packed_like, renamed, unwrapped
from fapm.formats.pickled import METADATA, describe, distributed_folder, torch_files
from fapm.formats.quantized import DESCRIPTION, dequantized, described_codes
from fapm.formats.side_files import (
    CARD,
    MAX_CONFIG_BYTES,
    MAX_SIDE_BYTES,
    MODEL_CONFIG,
    TOKENIZER,
    WEIGHT_SUFFIXES,
    side_files_of,
)
from fapm.formats.tensor import Part, Side, TensorInfo, leaves
from fapm.storage.address import open_store
from fapm.storage.layers import Layers
from fapm.storage.records import parse
from fapm.storage.store import FileStat, Store, overlapped

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
        warnings: sentences worth showing to the user.
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
    warnings: tuple[str, ...] = field(default=())
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
    on_conflict: str = "error", plain_codes: bool = False,
) -> Checkpoint:  # fmt: skip
    """Read the headers of the checkpoint in the folder `path`.

    Args:
        base: what an adapter is added to. Without it an adapter's own tensors are what is found.
        renames: FROM=TO, beginnings of base's names and the adapter's.
        allow_pickle: let another process look into pickles, if they are all that there is.
        on_conflict: what counts where several sparse task vectors do not agree: `first`, `last` or `error`.
        plain_codes: FP8 without a scale is the values that it spells.

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
        _refuse_two_kinds(folder, top, role)
        if pickled:
            read = _described(folder, *pickled, role, allow_pickle)
            warnings: list[str] = []
        else:
            read, warnings = _read_headers(folder, found, role)
            _add_modules(folder, found, read, role)
        checkpoint = _opened(folder, found, read, role, warnings)
        if {WEIGHTS, PICKLED} & checkpoint.identity.keys():
            return _with_adapter(checkpoint, base, renames)
        return _finished(_merged(checkpoint, base), base, plain_codes)
    finally:
        folder.close()


def _refuse_two_kinds(folder: Store, top: set[str], role: str) -> None:
    """Whether an adapter lies beside a whole model.

    Raises:
        UserError: it does, so that it cannot be known which is meant.
    """
    adapters = sorted({WEIGHTS, PICKLED} & top)
    others = sorted(
        {name for name in top if name.endswith(".safetensors")} - {WEIGHTS} | {*torch_files(top)} - {PICKLED}
    )
    if adapters and others:
        raise UserError(
            f"{role}: {folder.address} holds an adapter ({adapters[0]}) and a whole model ({others[0]}); give a folder "
            "that holds the one that counts"
        )


def _merged(checkpoint: Checkpoint, base: Checkpoint | None) -> Checkpoint:
    """The same with an adapter that was saved inside it, as FSDP and others leave it, added to its own weights.

    Some models (Phi-4-multimodal) have adapters for good: then base has the same names.

    Raises:
        UserError: it is not said how.
    """
    if base is None or checkpoint.role == "base":
        return checkpoint
    markers = [name for name in of_training(checkpoint.tensors) if name not in base.tensors]
    if not markers:
        return checkpoint
    folder, where = checkpoint.folder, f"{checkpoint.role}: {checkpoint.folder.address}"
    if not folder.has(CONFIG):
        raise UserError(
            f"{where}: {markers[0]} belongs to an adapter that was not merged, and there is no {CONFIG} that says how "
            "strong it is; put the one of the training there, or load the model with PEFT, call merge_and_unload() "
            "and save it"
        )
    said = read_adapter(_small(folder, CONFIG, where), where)
    kinds, side = _kinds(checkpoint), _side(checkpoint.role)
    tensors, gone = unmerged(said, checkpoint.tensors, kinds, where, side)
    warnings = (
        *checkpoint.warnings,
        f"{checkpoint.role}: an adapter inside it is added to its weights as they are read",
    )
    identity = {**checkpoint.identity, CONFIG: _identity_of(folder, CONFIG)}
    gone = _as_stored(checkpoint, gone)
    return replace(checkpoint, tensors=tensors, gone=gone, warnings=warnings, identity=identity)


def _as_stored(checkpoint: Checkpoint, gone: Mapping[str, str]) -> dict[str, str]:
    """The same by the names that the files have, before what training had put into them was taken out."""
    names = {(info.file, info.offset, info.nbytes): info.name for info in checkpoint.stored}
    infos = ((checkpoint.tensors[name], why) for name, why in gone.items())
    return {names.get((info.file, info.offset, info.nbytes), info.name): why for info, why in infos}


def _small(folder: Store, name: str, where: str) -> bytes:
    if folder.size(name) > MAX_CONFIG_BYTES:
        raise UserError(f"{where}: {name} has {folder.size(name)} bytes, more than any configuration")
    return folder.read(name)


def _kinds(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The `model_type`s of a configuration and its parts; none if its code is not transformers' own."""
    config = read_config(checkpoint)
    if "auto_map" in config:
        return ()
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return tuple(part["model_type"] for part in parts if isinstance(part.get("model_type"), str))


_Found = tuple[dict[str, TensorInfo], dict[str, dict[str, Any]]]
"""Tensors by name, and the identity of their files."""


def _read_headers(folder: Store, found: dict[str, FileStat], role: str) -> tuple[_Found, list[str]]:
    """Tensors of safetensors files, and warnings about them."""
    warnings: list[str] = []
    files, index = _weight_files(folder, {name for name in found if "/" not in name}, role, warnings)
    read = _headers_of(folder, files, found, role)
    _compare_with_index(index, read[0], role, warnings)
    return read, warnings


MODULES = "modules.json"
"""The folders of which a model of sentence-transformers consists."""

PIPELINE = "model_index.json"
"""The same of a pipeline of diffusers."""


def _add_modules(folder: Store, found: dict[str, FileStat], read: _Found, role: str) -> None:
    """Add the weights of the folders that a model names as its own, each tensor by its folder's name and its own.

    Raises:
        UserError: they are in a format that is not read.
    """
    for path in _module_folders(folder, found, role):
        inside = {name.removeprefix(f"{path}/") for name in found if name.startswith(f"{path}/")}
        if MODEL in inside:
            tensors, identity = _headers_of(folder, [f"{path}/{MODEL}"], found, role)
            read[0].update({f"{path}/{name}": replace(info, name=f"{path}/{name}") for name, info in tensors.items()})
            read[1].update(identity)
        elif weights := sorted(name for name in inside if name.endswith((".bin", ".pt", ".pth", ".safetensors"))):
            raise UserError(
                f"{role}: {folder.address} is a model of several folders ({MODULES}), and {path}/{weights[0]} is not "
                f"read; save it with safetensors ({path}/{MODEL})"
            )


def _module_folders(folder: Store, found: dict[str, FileStat], role: str) -> list[str]:
    if MODULES not in found:
        return []
    try:
        listed = parse(_small(folder, MODULES, f"{role}: {folder.address}"))
        paths = [str(module["path"]) for module in listed]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{role}: {folder.at(MODULES)} does not list the folders of a model") from None
    names = {name.rpartition("/")[0] for name in found}
    return [path for path in dict.fromkeys(paths) if path in names and path and "/" not in path]


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
    """Base with a sparse task vector applied; without base, the vector's own tensors."""
    where = f"{role}: {folder.address}"
    said = read_delta(folder, where)
    missing = [name for name in said["files"] if name not in found]
    if missing:
        raise UserError(f"{where}: {missing[0]} is missing; fetch the sparse task vector again")
    if role == "base":
        raise UserError(f"{where} holds a sparse task vector, which is no base; give it as --finetuned")
    read = _headers_of(folder, sorted(said["files"]), found, role)
    warnings = [f"{role}: {summary(said, sum(found[name].size for name in said['files']))}"]
    opened = _opened(folder, found, read, role, warnings)
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
    """Base with several sparse task vectors applied, with the last one's side files."""
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
        last.side_files, tuple(warning for one in opened for warning in one.warnings),
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


def _opened(folder: Store, found: dict[str, FileStat], read: _Found, role: str, warnings: list[str]) -> Checkpoint:
    tensors, identity = read
    side_files, left = side_files_of(found)
    _stay_inside(folder, (*identity, *side_files, *({CARD} & found.keys())), role)
    size = found[MODEL_CONFIG].size if MODEL_CONFIG in found else 0
    if size > MAX_CONFIG_BYTES:
        raise UserError(f"{role}: {folder.at(MODEL_CONFIG)} has {size} bytes, more than any configuration")
    large = [n for n in left if found[n].size > MAX_SIDE_BYTES and not n.endswith(WEIGHT_SUFFIXES)]
    for name in large:
        if name.startswith(TOKENIZER):
            raise UserError(
                f"{role}: {folder.at(name)} has {found[name].size} bytes, more than any tokenizer; take it out of the "
                "folder if the output is to have none"
            )
    left = [n for n in left if n not in identity and ("/" in n or not n.endswith(".safetensors"))]  # these are said
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        warnings.append(
            f"{role}: left behind, as no part of the model: {', '.join(left[:5])}{more} (other folders, other formats, "
            "states of training, files of more than 256 MiB)"
        )
    stored = tuple(leaf.info for info in tensors.values() for leaf in leaves(Part(_side(role), info)))
    bare = unwrapped(tensors, role, warnings)
    return Checkpoint(role, folder, bare, identity, side_files, tuple(warnings), stored=stored)


def _finished(checkpoint: Checkpoint, base: Checkpoint | None, plain_codes: bool) -> Checkpoint:
    """The same with the weights that codes stand for, and with base's side files where it has no configuration."""
    if base and MODEL_CONFIG not in checkpoint.side_files and MODEL_CONFIG in base.side_files:
        borrowed = {name: base.folder for name in base.side_files if name not in checkpoint.side_files}
        side_files = tuple(sorted({*checkpoint.side_files, *borrowed}))
        said = f"{checkpoint.role} has no {MODEL_CONFIG}: base's is taken, with the files beside it"
        warnings = (*checkpoint.warnings, said)
        checkpoint = replace(checkpoint, side_files=side_files, borrowed=borrowed, warnings=warnings)
    return _with_weights(checkpoint, plain_codes)


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
    _stay_inside(folder, _described_by(kind, names), role)
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


def _described_by(kind: str, names: Sequence[str]) -> list[str]:
    return [*names] if kind == "torch" else [METADATA if name == "." else f"{name}/{METADATA}" for name in names]


def _with_weights(checkpoint: Checkpoint, plain_codes: bool) -> Checkpoint:
    """The same with the weights that its codes stand for, if it is quantized.

    Raises:
        UserError: it says that it is, and is not.
    """
    where = f"{checkpoint.role}: {checkpoint.folder.address}"
    described = described_codes(read_config(checkpoint), read_json(checkpoint, DESCRIPTION))
    tensors, gone = dequantized(checkpoint.tensors, described, _side(checkpoint.role), where, plain_codes)
    if not gone:
        if described and checkpoint.role == "finetuned":
            what = str(described.get("quant_method") or "some")[:40]
            raise UserError(
                f"{where}: its configuration says that its weights are {what} codes, and none of its tensors holds "
                f"any; take quantization_config out of {MODEL_CONFIG} (and {DESCRIPTION} away) if the weights are what "
                "they seem, or give the folder that has the codes"
            )
        return checkpoint
    many = sum(info.form is not None for info in tensors.values())
    said = f"{checkpoint.role}: {many} quantized tensor(s) are taken as the bfloat16 that they stand for"
    describing = [name for name in (MODEL_CONFIG, DESCRIPTION) if name in checkpoint.side_files]
    identity = {**checkpoint.identity, **{name: _identity_of(checkpoint.folder, name) for name in describing}}
    side_files = tuple(name for name in checkpoint.side_files if name != DESCRIPTION)
    warnings = (*checkpoint.warnings, said)
    return replace(
        checkpoint,
        tensors=tensors,
        gone={**checkpoint.gone, **_as_stored(checkpoint, gone)},
        identity=identity,
        side_files=side_files,
        warnings=warnings,
        quantized=True,
    )


def _side(role: str) -> Side:
    """The side on which forms find a checkpoint; one that is only looked at is on either."""
    return "base" if role == "base" else "finetuned"


def _identity_of(folder: Store, name: str) -> dict[str, Any]:
    """Identity of a small file that decides what weights mean."""
    stat = folder.files()[name]
    return {"size": stat.size, **stat.version, "header": _digest(folder.read(name))}


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json, or nothing if there is none or it is none."""
    return read_json(checkpoint, MODEL_CONFIG)


def read_json(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """The object in a side file, or nothing if there is none."""
    if name not in checkpoint.side_files:
        return {}
    folder = checkpoint.borrowed.get(name, checkpoint.folder)
    if folder.size(name) > MAX_CONFIG_BYTES:
        raise UserError(
            f"{checkpoint.role}: {folder.at(name)} has {folder.size(name)} bytes, more than any configuration"
        )
    try:
        found = parse(checkpoint.read(name))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _with_adapter(adapter: Checkpoint, base: Checkpoint | None, renames: Sequence[str]) -> Checkpoint:
    """base with an adapter: base's tensors and side files, and what the adapter brings of its own."""
    folder, where = adapter.folder, f"{adapter.role}: {adapter.folder.address}"
    if adapter.role == "base":
        raise UserError(f"{where} holds a LoRA adapter, which is no base; give it as --finetuned")
    if not folder.has(CONFIG):
        raise UserError(f"{where} holds a LoRA adapter without its {CONFIG}")
    said = read_adapter(_small(folder, CONFIG, where), where)
    identity = {**adapter.identity, CONFIG: _identity_of(folder, CONFIG)}
    if base is None:
        return replace(adapter, identity=identity)
    warnings = [*adapter.warnings]
    known, gone = adapter.tensors, dict[str, str]()
    if ties(read_config(base)):
        known, gone = without_tied_head(said, known, base.tensors, where)
    tensors = with_adapter(said, known, base.tensors, renames, _kinds(base), where, warnings)
    own = [name for name in adapter.side_files if name not in (CONFIG, "README.md") and name.startswith(TOKENIZER)]
    borrowed = {name: base.folder for name in base.side_files if name not in own}
    warnings.append(f"{adapter.role}: an adapter; what base becomes with it is formed while it is read")
    side_files = tuple(sorted({*own, *borrowed}))
    return replace(
        adapter,
        tensors=tensors,
        identity=identity,
        side_files=side_files,
        warnings=tuple(warnings),
        borrowed=borrowed,
        gone=_as_stored(adapter, gone),
        quantized=base.quantized,
    )


def _weight_files(
    folder: Store, top: set[str], role: str, warnings: list[str]
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
        if MODEL in weights and files != [MODEL] and all(_SAFETENSORS.fullmatch(name) for name in files):
            if not missing:
                raise UserError(
                    f"{role}: {folder.address} holds two checkpoints, {MODEL} and the {len(files)} files of "
                    f"{indices[0]}; transformers would read {MODEL}: remove the one that does not count"
                )
            warnings.append(
                f"{role}: {MODEL} is read, as transformers does; {indices[0]} is of an older save, whose "
                f"{missing[0]} is gone"
            )
            _mention_ignored(weights, [MODEL], role, warnings)
            return [MODEL], None
        if missing:
            raise UserError(
                f"{role}: {indices[0]} names {len(missing)} file(s) that {folder.address} does not have: "
                f"{', '.join(map(repr, missing[:3]))}; fetch the checkpoint again"
            )
        _mention_ignored(weights, files, role, warnings)
        return files, weight_map
    if "model.safetensors" in weights:
        _mention_ignored(weights, ["model.safetensors"], role, warnings)
        return ["model.safetensors"], None
    parts = [name for name in weights if not name.startswith("consolidated")] or weights
    inside = [] if parts else sorted(n.rpartition("/")[0] for n in folder.files() if n.endswith(f"/{CONFIG}"))
    if inside:
        raise UserError(
            f"{role}: no checkpoint in {folder.address}: it has no safetensors, and adapters in "
            f"{', '.join(inside[:3])}{', …' if len(inside) > 3 else ''}; give the folder of the one that counts"
        )
    if not parts and PIPELINE in top:
        raise UserError(
            f"{role}: {folder.address} is a pipeline of several models ({PIPELINE}); prune each by its own folder "
            f"({', '.join(sorted(folder.folders())[:4])})"
        )
    _refuse_half(parts, folder, role)
    if not parts:
        others = sorted(n for n in top if n.endswith((".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")))
        why = f"only {others[0]}, which is not read; save it as safetensors first" if others else "no safetensors"
        raise UserError(f"{role}: no checkpoint in {folder.address}: it has {why}")
    if len(parts) > 1:
        warnings.append(f"{role}: {len(parts)} safetensors files and no index; all of them are taken")
    _mention_ignored(weights, parts, role, warnings)
    return parts, None


_SAFETENSORS = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


def _refuse_half(parts: Sequence[str], folder: Store, role: str) -> None:
    """Whether files that are numbered are all there.

    Raises:
        UserError: some are missing, or they are of several cuts.
    """
    cuts: dict[tuple[str, int], set[int]] = {}
    for name in parts:
        found = _SHARD.fullmatch(name)
        if found:
            cuts.setdefault((found[1], int(found[3])), set()).add(int(found[2]))
    if len(cuts) > 1 and len({stem for stem, _ in cuts}) < len(cuts):
        raise UserError(
            f"{role}: {folder.address} has files of several cuts and no index; keep those that belong together"
        )
    for (stem, count), there in cuts.items():
        if len(there) != count:
            raise UserError(
                f"{role}: {folder.address} has {len(there)} of the {count} files of {stem}, and no index; fetch the "
                "checkpoint again"
            )


def _mention_ignored(weights: list[str], taken: list[str], role: str, warnings: list[str]) -> None:
    ignored = [name for name in weights if name not in taken]
    if ignored:
        warnings.append(f"{role}: not part of the checkpoint and ignored: {', '.join(ignored[:5])}")


def _read_index(folder: Store, name: str, role: str) -> dict[str, str]:
    if folder.size(name) > MAX_HEADER_BYTES:
        raise UserError(f"{role}: {folder.at(name)} is larger than any index")
    try:
        weight_map: dict[str, str] = parse(folder.read(name))["weight_map"]
        if not weight_map or not all(isinstance(k, str) and isinstance(v, str) for k, v in weight_map.items()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{role}: {folder.at(name)} is not an index with a weight_map of names to files") from None
    return weight_map


def _compare_with_index(
    index: dict[str, str] | None, tensors: dict[str, TensorInfo], role: str, warnings: list[str]
) -> None:
    if index is None:
        return
    lost = [name for name in index if name not in tensors]
    if lost:
        raise UserError(
            f"{role}: the index names {lost[0]!r}{_more(lost)}, and none of its files has it; fetch the checkpoint "
            "again"
        )
    for names, what in (
        ([n for n in tensors if n not in index], "is in a file and not in the index; it is taken"),
        ([n for n, t in tensors.items() if index.get(n, t.file) != t.file], "is in another file than the index says"),
    ):
        if names:
            warnings.append(f"{role}: tensor {names[0]!r}{_more(names)} {what}")


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def architecture(side: Checkpoint) -> str:
    """The class of its model, as its configuration calls it; empty where it does not."""
    listed = read_config(side).get("architectures")
    return listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else ""
