"""Settings that make a GPU compute the same bits each time: ``--deterministic``.

On a CPU, a run and its restarts are always equal to the last bit.  On a GPU they are equal only up to the order of
sums: cuDNN chooses algorithms by timing them at each start, some operators add with atomics, Inductor chooses kernels
by timing, and DALI gives some images to the JPEG engine and others to a decoder that rounds differently.
"""

import os
import re
from typing import Any

import torch

_NO_DETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")


def configure(deterministic: bool) -> None:
    """Make this process compute deterministically, or as fast as possible.  Call before any computation on a GPU."""
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic)
    if not deterministic:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # otherwise cuBLAS may split sums differently each time
    memory: Any = torch.utils.deterministic
    memory.fill_uninitialized_memory = False  # it only helps to find bugs, and writes all memory twice
    from torch._inductor import config as inductor  # imported here because it takes a second

    if hasattr(inductor, "deterministic"):
        inductor.deterministic = True


def decoder_load() -> float:
    """Return the share of JPEG images that DALI gives to the GPU's decoding engine."""
    return 0.0 if torch.are_deterministic_algorithms_enabled() else 0.75


def explain(error: BaseException) -> str | None:
    """Explain in one line that an operator has no deterministic implementation, or return None for other errors."""
    match = _NO_DETERMINISTIC.search(str(error)) if isinstance(error, RuntimeError) else None
    if match is None:
        return None
    return (
        f"--deterministic: torch has no deterministic {match.group(1)} for this device, and this run needs it: omit "
        "--deterministic, or use another method, encoder or size"
    )
