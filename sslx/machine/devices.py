"""The device that a rank trains on."""

import os
from typing import Literal

import torch

from sslx.console.words import plural
from sslx.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


def of_rank(device: Device, local_rank: int) -> torch.device:
    """Return the device of the ``local_rank``-th rank of this machine.  Raise ConfigError if there is none for it.

    device: "auto" uses a GPU if there is one.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and num_gpus == 0:
        raise ConfigError("expected a CUDA GPU for --device cuda, but none is visible: use --device cpu or auto")
    if device == "cpu" or num_gpus == 0:
        return torch.device("cpu")
    if local_rank < num_gpus:
        return torch.device("cuda", local_rank)
    if num_gpus == 1 and "SLURM_LOCALID" in os.environ:  # with --gpus-per-task, each task sees only its own GPU
        return torch.device("cuda", 0)
    raise ConfigError(
        f"expected a GPU for each rank of a machine, got local rank {local_rank} and {plural(num_gpus, 'GPU')}: "
        "start fewer ranks per machine"
    )


def autocast(device: torch.device, precision: Precision = "auto") -> torch.dtype | None:
    """Return the dtype to autocast to when features are computed, or None for float32 throughout.

    precision: "auto" is bf16 on a GPU that supports it, else float32.
    """
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else None
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
