"""Whether this machine has a GPU, found without importing torch, which takes seconds."""

import os
from pathlib import Path

_DEVICES = ("nvidia[0-9]*", "dxg", "kfd")
"""Device files below /dev of NVIDIA's driver, of Windows' Linux (WSL) and of AMD's driver."""


def visible() -> bool:
    """Return whether there seems to be a GPU that this process may use."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return any(True for pattern in _DEVICES for _ in Path("/dev").glob(pattern))


def is_requested(device: str) -> bool:
    """Return whether --device means a GPU on this machine: cuda, or auto if there is one."""
    return device == "cuda" or (device != "cpu" and visible())
