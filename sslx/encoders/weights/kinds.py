"""Says in words what a file is that holds no weights, or why it cannot be read, and what to do."""

import re
import zipfile
from pathlib import Path
from typing import cast

from torch import Tensor

from sslx.console.words import shown

_TEXT = bytes([9, 10, 13, *range(32, 127), *range(128, 256)])  # the bytes of texts in UTF-8 and other encodings


def other_kind(path: Path, head: bytes) -> str:
    """Return what a file that does not hold weights is, and what to do; an empty string if it may hold weights.

    head: the first bytes of the file.
    """
    text = head.lstrip().lower()
    if not head:
        return "empty: copy or download it again"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights themselves: run git lfs pull in its repository"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, not weights: the download went wrong"
    if head.startswith(b"\x89HDF"):
        return "an HDF5 file (as Keras writes): expected a torch or safetensors file"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"(\xb5/\xfd")):
        return "a compressed archive: unpack it and use the file in it"
    if head.startswith(b"\x93NUMPY"):
        return "a single NumPy array: expected a torch or safetensors file with tensors by name"
    if head.startswith(b"GGUF"):
        return "a GGUF file: expected a torch or safetensors file"
    if text.startswith(b"{"):
        return "JSON text, not weights: use the .safetensors or .pt file beside it"
    if not head.translate(None, _TEXT):
        return "a text file, not weights: expected a torch or safetensors file"
    return _kind_of_zip(path) if head.startswith(b"PK") else ""


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, NotImplementedError):
        return "truncated or damaged: copy or download it again"
    if any(name.endswith("constants.pkl") for name in names):
        return (
            "a TorchScript archive, which is a program with weights: if you trust it, save "
            "torch.jit.load(FILE).state_dict() with torch.save"
        )
    if names and all(name.endswith(".npy") for name in names):
        return "an .npz archive of NumPy arrays: expected a torch or safetensors file with tensors by name"
    if not any(name.endswith("data.pkl") for name in names):
        return f"a zip archive without weights (it has {listed(names)}): unpack it and use the file in it"
    return ""


def reason(error: Exception) -> str:
    """Return why torch or safetensors cannot read a file, without their advice to trust the file."""
    text = str(error) or type(error).__name__
    if match := re.search(r"(?:GLOBAL|global|class) [`']?([\w.]+)[`']?", text):
        return (
            f"it holds a {match[1]} object, not only tensors, and none of it was run: if you trust it, save its "
            "state_dict alone with torch.save"
        )
    if "PytorchStreamReader" in text or "central directory" in text:
        return "it is truncated or damaged: copy or download it again"
    if "weights_only" in text:  # torch's advice is for programmers
        return "it is neither a torch nor a safetensors file, or it is damaged: copy or download it again"
    return shown(text.splitlines()[0])


def of_content(content: object) -> str:
    """Describe the content of a file that has no tensors by name."""
    if isinstance(content, Tensor):
        return f"one tensor of shape {tuple(content.shape)} without a name"
    if isinstance(content, dict):
        names = [str(key) for key in cast(dict[object, object], content)]
        return f"a dict without tensors (it has {listed(names, 6)})" if names else "an empty dict"
    return f"a {type(content).__name__} object"


def listed(names: list[str], limit: int = 3) -> str:
    """Join the first ``limit`` names by commas."""
    return ", ".join(map(shown, names[:limit])) + (", ..." if len(names) > limit else "")
