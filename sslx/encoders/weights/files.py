"""Reads files and folders of weights as plain data: torch, safetensors, their shards, save_pretrained, DCP.

No code in a file is run.
"""

import argparse
import json
import re
from contextlib import suppress
from pathlib import Path, PosixPath
from typing import Any, cast

import torch

from sslx.console.words import one_line, shown
from sslx.encoders.weights import dcp, kinds
from sslx.errors import DataError
from sslx.machine import files

_OF_SETTINGS = re.compile(
    r"omegaconf\..*|typing\.Any|builtins\.(dict|list|tuple|str|int|float|bool)|collections\.defaultdict"
)
"""Classes in which Hydra stores settings beside the weights."""
_DICT_OF_LIGHTNING = re.compile(r"(pytorch_lightning|lightning|lightning_fabric)\..*\bAttributeDict")
_IN_FOLDERS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.pth",
)
"""The files of a folder that save_pretrained, timm, open_clip or sslx wrote, the preferred ones first."""


def in_folder(folder: Path) -> Path | None:
    """Return the file of weights in a folder of another library, the folder itself if it is DCP's, or None."""
    if dcp.is_checkpoint(folder):
        return folder
    return next((folder / name for name in _IN_FOLDERS if (folder / name).is_file()), None)


def config_beside(path: Path) -> dict[str, object]:
    """Return the content of the ``config.json`` beside a file of weights or in a folder; {} if there is none.

    What ``open_clip_config.json`` says of a ViT is added: ``num_attention_heads`` and ``quick_gelu``.
    """
    folder = path if path.is_dir() else path.parent
    model = _json(folder / "open_clip_config.json").get("model_cfg")
    return {**_json(folder / "config.json"), **(_of_open_clip(model) if isinstance(model, dict) else {})}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(files.read_text(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", content) if isinstance(content, dict) else {}


def _of_open_clip(model: dict[str, Any]) -> dict[str, object]:
    with suppress(LookupError, TypeError, AttributeError, ZeroDivisionError):
        vision: dict[str, Any] = model["vision_cfg"]
        if isinstance(vision["layers"], int):
            num_heads = vision["width"] // vision.get("head_width", 64)
            return {"num_attention_heads": num_heads, "quick_gelu": bool(model.get("quick_gelu"))}
    return {}


def metadata(path: Path) -> dict[str, str]:
    """Return the texts by name in the header of a safetensors file; {} for any other or damaged file."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except Exception:  # safetensors raises exceptions of any type; reading the tensors says what is wrong
        return {}


def read(path: Path) -> object:
    """Return the content of a torch or safetensors file; its name does not matter.

    For the index of a sharded file (.index.json), return the tensors of all shards, and for a DCP folder its tensors.
    Raises DataError, which says what the file is, for any other file.
    """
    if path.is_dir():
        return dcp.read(path)
    if not path.is_file():
        raise DataError(f"{shown(path)} is not a regular file: copy or download the weights")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    with open(path, "rb") as file:
        head = file.read(512)
    if kind := kinds.other_kind(path, head):
        raise DataError(f"{shown(path)} is {kind}")
    try:
        if _is_safetensors(head, path.stat().st_size):
            from safetensors.torch import load_file

            return load_file(path)
        # torch gets an open file instead of a path, because it would choose the format by the path's suffix.
        with torch.serialization.safe_globals(_settings_classes(path)), open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # pickle and safetensors raise exceptions of any type
        raise DataError(f"cannot load weights from {shown(path)} safely: {kinds.reason(error)}") from error


class _Settings:
    """Stands for an object that held a training script's settings: it takes what the file says and keeps nothing."""

    def __new__(cls, *_: object, **__: object) -> "_Settings":
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def _settings_classes(path: Path) -> list[Any]:
    """Return the classes for what training scripts store beside the weights: plain ones, and stand-ins for others."""
    classes: list[Any] = [argparse.Namespace, PosixPath]
    with suppress(Exception):  # the file is damaged, or of a format without such a list: torch.load says what it is
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        classes += [(_Settings, name) for name in names if _OF_SETTINGS.fullmatch(name)]
        classes += [(dict, name) for name in names if _DICT_OF_LIGHTNING.fullmatch(name)]
    return classes


def _is_safetensors(head: bytes, num_bytes: int) -> bool:
    """Return whether a file of ``num_bytes`` begins with the length of a JSON header that fits in it, and a brace."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") + 8 <= num_bytes


def _read_shards(index: Path) -> dict[str, object]:
    """Return the tensors of all shards that an index names."""
    try:
        content = json.loads(files.read_text(index, 1 << 26))
        places: dict[str, str] = content["weight_map"]
        names = sorted({str(name) for name in places.values()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{shown(index)} is not the index of a sharded file, which has a weight_map: {one_line(repr(error))}"
        ) from error
    tensors = dict[str, object]()
    for name in names:
        if not re.fullmatch(r"[^/\\]+", name) or not (index.parent / name).is_file():
            raise DataError(f"{shown(index)} names the file {shown(name)}, which is not beside it: copy it there")
        shard = read(index.parent / name)
        if not isinstance(shard, dict):
            raise DataError(f"{shown(index.parent / name)} is no shard: it is {kinds.of_content(shard)}")
        tensors |= cast(dict[str, object], shard)
    if missing := [name for name in places if name not in tensors]:
        raise DataError(f"the shards of {shown(index)} lack {len(missing)} tensors ({kinds.listed(missing)})")
    return tensors
