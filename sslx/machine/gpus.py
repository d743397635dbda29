"""Whether this machine has a GPU, asked without importing torch, which takes seconds."""

import os
from pathlib import Path

_DEVICES = ("nvidia[0-9]*", "dxg", "kfd")
"""Of NVIDIA's driver, of Windows' Linux and of AMD's driver, below /dev."""


def visible() -> bool:
    """Whether there seems to be a GPU that this process may use."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return any(True for pattern in _DEVICES for _ in Path("/dev").glob(pattern))


def wanted(device: str) -> bool:
    """Whether --device means a GPU here: cuda, or auto where there is one."""
    return device == "cuda" or (device != "cpu" and visible())
