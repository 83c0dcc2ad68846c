"""Says where the tensors of pickled checkpoints lie. Run as a process of its own, which gives up network and writing.

    python -I unpickle.py torch FOLDER FILE...      files of torch.save
    python -I unpickle.py dcp FOLDER FOLDER         what torch.distributed.checkpoint leaves

Nothing but names, shapes and places is taken from a pickle: no weight is loaded. Even so, to read a pickle is to run
what it says. So it is torch's reader with `weights_only`, or an unpickler that knows nothing but what describes such a
checkpoint; and before it begins, the process can neither open a file to write, nor remove one, nor start a program, nor
speak to a network (seccomp), and its memory is bounded. It answers with JSON on its standard output.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
from typing import Any, BinaryIO, ClassVar

_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip

_MEMORY = 512 << 20  # beside what torch takes for itself


def _places(file: BinaryIO) -> Any:
    """Contents of a file of torch.save, with tensors that know where their bytes are and have none."""
    import torch
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        return torch.load(file, weights_only=True)


def _place(tensor: Any) -> dict[str, Any]:
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset is None:
        raise ValueError("it is in torch's old format, or this torch is older than 2.7")
    if not tensor.is_contiguous():
        raise ValueError("it is not stored in its own order")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ValueError(f"its dtype is {dtype}")
    return {
        "dtype": _DTYPES[dtype],
        "shape": list(tensor.shape),
        "offset": offset + tensor.storage_offset() * tensor.element_size(),
        "nbytes": tensor.numel() * tensor.element_size(),
    }


def torch_files(folder: str, names: list[str]) -> list[dict[str, Any]]:
    import torch

    found = []
    for name in names:
        with open(os.path.join(folder, name), "rb") as file:
            loaded = _places(file)
        for key in ("state_dict", "model", "module", "model_state_dict"):
            if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
                loaded = loaded[key]
        if not isinstance(loaded, dict):
            raise ValueError(f"{name} holds no tensors by name")
        for key, value in loaded.items():
            if isinstance(value, torch.Tensor):
                try:
                    found.append({"name": str(key), "file": name, **_place(value)})
                except ValueError as error:
                    raise ValueError(f"{name}: tensor {str(key)[:200]!r}: {error}") from None
    return found


class _Describing(pickle.Unpickler):
    """Knows the classes of which the description of a distributed checkpoint consists, and no other."""

    _KNOWN: ClassVar = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", *_DTYPES, "int16", "uint16", "uint32", "uint64", "complex64", "complex128", "device"},
        "collections": {"OrderedDict"},
        "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if name not in self._KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module[:80]}.{name[:80]}")
        return super().find_class(module, name)


class _Slice(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: Any, start: int, length: int):
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, (0, self._at, self._length)[whence] + offset)
        return self._at

    def readinto(self, target: Any) -> int:
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(len(target), self._length - self._at)))
        target[: len(data)] = data
        self._at += len(data)
        return len(data)


def distributed(folder: str, inside: str) -> list[dict[str, Any]]:
    root = os.path.join(folder, inside) if inside != "." else folder
    with open(os.path.join(root, ".metadata"), "rb") as described:
        metadata = _Describing(described).load()
    stored: dict[str, dict[tuple[int, ...], Any]] = {}
    for index, info in metadata.storage_data.items():
        stored.setdefault(index.fqn, {})[tuple(index.offset or ())] = info
    paths = metadata.planner_data or {}
    found = []
    for name, about in metadata.state_dict_metadata.items():
        if not hasattr(about, "chunks"):
            continue
        path = [str(part) for part in paths.get(name, (name,))]
        if path[0] in ("optim", "optimizer", "optimizer_state", "optimizer_states", "lr_scheduler"):
            continue
        chunks = []
        for chunk in about.chunks:
            info = stored[name][tuple(chunk.offsets)]
            if getattr(info, "transform_descriptors", None):
                raise ValueError(f"tensor {name[:200]!r} is stored compressed")
            file = str(info.relative_path)
            if os.path.basename(file) != file or file.startswith("."):
                raise ValueError(f"it names the file {file[:200]!r}")
            with open(os.path.join(root, file), "rb") as whole:
                place = _place(_places(io.BufferedReader(_Slice(whole, info.offset, info.length), 1 << 16)))
            place["offset"] += info.offset
            named = file if inside == "." else f"{inside}/{file}"
            chunks.append({"at": list(chunk.offsets), "file": named, **place})
        outermost = len(path) > 1 and path[0] in ("model", "app", "state_dict", "module")
        found.append({"name": ".".join(path[1:] if outermost else path), "shape": list(about.size), "chunks": chunks})
    return found


def main() -> None:
    kind, folder, *names = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from sandbox import give_up_the_world, limit, refuse  # type: ignore[import-not-found]

    sys.path.pop(0)
    import torch

    if kind == "dcp":
        import torch.distributed.checkpoint
    torch.set_num_threads(1)
    practice = io.BytesIO()
    torch.save({"a": torch.ones(1)}, practice)
    practice.seek(0)
    _places(practice)  # what torch looks for when it is first used, it finds before the world is given up
    limit(_MEMORY, 100)
    try:
        give_up_the_world()
        found = torch_files(folder, names) if kind == "torch" else distributed(folder, names[0])
        sys.stdout.write(json.dumps(found))
    except MemoryError:
        refuse("it takes more memory than any description of tensors")
    except Exception as error:  # whatever a stranger's file brings about
        refuse(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
