"""The names of this machine's processors."""

import platform
from typing import TYPE_CHECKING

from sslx.machine import proc

if TYPE_CHECKING:
    import torch


def cpu() -> str:
    """Return the name of the CPU and those of its instruction sets that matter for speed, if the system tells them."""
    lines = proc.read("cpuinfo").splitlines()
    if not lines:
        return platform.processor()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    fast = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{model} ({' '.join(fast)})"


def device_name(device: "torch.device") -> str:
    """Return the name of a device's GPU, or of the CPU."""
    if device.type == "cuda":
        import torch  # here: this module is also used where torch is not needed

        return torch.cuda.get_device_name(device)
    return cpu()
