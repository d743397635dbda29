"""Reads folders of torch.distributed.checkpoint (DCP), as FSDP writes them, without running code in them.

Such a folder has files with the bytes of tensors, or of parts of them, and ``.metadata``, a pickle that says where each
part is.  torch reads that pickle with code in it.  Here, an unpickler replaces the few classes that it may name by
records that only hold values, and refuses all others.
"""

import io
import pickle
import re
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from torch import Tensor

from sslx.console.words import one_line, shown
from sslx.encoders.weights import kinds
from sslx.errors import DataError

_METADATA = ".metadata"
_CLASSES = ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "MetadataIndex", "StorageMeta", "_StorageInfo", "_MEM_FORMAT_ENCODING")  # fmt: skip
"""Classes of torch.distributed.checkpoint that the metadata consists of."""
_OPTIMIZERS = re.compile(r"optim(izer)?s?(_states?)?(\.|$)")
_MAX_BYTES = 1 << 28


class _Record:
    """Holds the values of an object of a class that is not imported."""

    def __new__(cls, *values: object) -> "_Record":
        record = super().__new__(cls)
        record.state = values
        return record

    state: object

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            vars(self).update(cast(dict[str, object], state))
        else:
            self.state = state


class _Unpickler(pickle.Unpickler):
    """Builds records, sizes, dtypes and containers, and nothing else."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name.startswith("torch.distributed.checkpoint.") and global_name in _CLASSES:
            return _Record
        if module_name == "torch" and global_name == "Size":
            return torch.Size
        if module_name == "torch" and isinstance(value := getattr(torch, global_name, None), torch.dtype):
            return value
        if (module_name, global_name) in (("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")):
            return _Record
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return dict
        raise DataError(f"it names a {module_name}.{global_name}, and none of it was run")


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder was written by torch.distributed.checkpoint."""
    return (folder / _METADATA).is_file()


def read(folder: Path) -> dict[str, Tensor]:
    """Return the whole tensors of a DCP folder by name, without those of an optimizer.

    Raises DataError if the folder is damaged or its metadata names anything but tensors.
    """
    try:
        with open(folder / _METADATA, "rb") as file:
            metadata: Any = _Unpickler(io.BytesIO(file.read(_MAX_BYTES))).load()
        places = {(key.fqn, getattr(key, "offset", None)): info for key, info in metadata.storage_data.items()}
        entries = cast(dict[str, Any], metadata.state_dict_metadata)
        return {
            name: _whole(folder, name, entry, places)
            for name, entry in entries.items()
            if hasattr(entry, "chunks") and not _OPTIMIZERS.match(name)
        }
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged pickle raises exceptions of any type
        text = one_line(error) if isinstance(error, DataError | OSError) else kinds.reason(error)
        raise DataError(f"cannot load the distributed checkpoint {shown(folder)} safely: {text}") from error


def _whole(folder: Path, name: str, entry: Any, places: dict[tuple[str, Any], Any]) -> Tensor:
    """Return a tensor put together from its parts, which may be in several files.

    places: where each part is, by the tensor's name and the part's offset, or None for a whole tensor.
    """
    tensor: Tensor | None = None
    num_filled = 0
    for chunk in entry.chunks:
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        part = _part(folder, places[name, chunk.offsets if (name, chunk.offsets) in places else None])
        if tuple(part.shape) != sizes:
            raise DataError(f"a part of {name} has the shape {tuple(part.shape)}, not {sizes}")
        if tensor is None:
            tensor = part.new_empty(tuple(entry.size))
        tensor[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))] = part
        num_filled += part.numel()
    if tensor is None or num_filled != tensor.numel():
        raise DataError(f"parts of {name} are missing")
    return tensor


def _part(folder: Path, info: Any) -> Tensor:
    path = PurePosixPath(info.relative_path)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"it names a file outside the folder, {shown(path)}")
    with open(folder / path, "rb") as file:
        file.seek(info.offset)
        part = torch.load(io.BytesIO(file.read(info.length)), map_location="cpu", weights_only=True)
    if not isinstance(part, Tensor):
        raise DataError(f"{shown(path)} holds {kinds.of_content(part)}, not a tensor")
    return part
