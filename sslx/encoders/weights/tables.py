"""Tables: tensors by name, wherever they are in the nested dicts of a file."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import Tensor

from sslx.encoders.weights import dcp, files, kinds
from sslx.errors import DataError, MissingInput
from sslx.machine.files import expanded
from sslx.runs import checkpoint

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts that torch's wrappers insert anywhere into the names of tensors."""
_MAX_DEPTH, _MAX_TABLES = 8, 1000
_EXPECTED = (
    "expected 'timm' (timm's own weights), a run folder of sslx, or a .pt, .pth or .safetensors file, or a folder of "
    "save_pretrained or DCP, on this machine"
)


@dataclass(frozen=True)
class Table:
    """Tensors by name, and the keys that lead to them in the file, such as ("state_dict",)."""

    path: tuple[str, ...]
    tensors: dict[str, Tensor]


def tables(source: str, origin: str, part: str | None = None) -> list[Table]:
    """Return all tables of tensors in a file; of an sslx run the encoder it exports, or all if a part is named.

    source: a run folder, a checkpoint in it, a file of torch or safetensors, or a folder of another library.
    origin: how messages name the source.
    Raises MissingInput if there is no such file, and DataError if it holds no weights.
    """
    path = located(source, origin)
    is_dcp = dcp.is_checkpoint(path)
    if not is_dcp and (path.is_dir() or (path.parent / "manifest.json").is_file()):
        name = "encoder" if part is None else "method"
        return [Table((name,), cast(dict[str, Tensor], checkpoint.load(path, needs=(name,))[name]))]
    content = files.read(path)
    if not (found := list(walk(content))):
        raise DataError(f"{origin} holds no weights: expected tensors by name, got {kinds.of_content(content)}")
    return found


def located(source: str, origin: str) -> Path:
    """Return the path of a source, and for a folder of another library that of its file of weights."""
    if re.match(r"[A-Za-z][\w+.-]*:(//|[^\\])", source) and not Path(source).exists():
        raise MissingInput(f"{origin} is not a file: download it first; {_EXPECTED}")
    path = expanded(source)
    if not path.exists():
        raise MissingInput(f"{origin} does not exist: {_EXPECTED}")
    return files.in_folder(path) or path if path.is_dir() else path


def walk(content: object) -> Iterator[Table]:
    """Yield the tables in nested dicts, outermost first."""
    pending: list[tuple[object, tuple[str, ...]]] = [(content, ())]
    for _ in range(_MAX_TABLES):
        if not pending:
            return
        value, path = pending.pop(0)
        if not isinstance(value, dict):
            continue
        items = cast(dict[object, object], value)
        tensors = {key: value for key, value in items.items() if isinstance(key, str) and isinstance(value, Tensor)}
        if tensors:
            yield Table(path, tensors)
        if len(path) < _MAX_DEPTH:
            pending += [(v, (*path, str(k))) for k, v in items.items() if isinstance(v, dict) and k != "optimizer"]


def unwrapped(name: str) -> str:
    """Return the name of a tensor without the parts that torch's wrappers inserted."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
