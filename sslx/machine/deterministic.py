"""What makes a GPU compute the same bits again: ``--deterministic``.

On a CPU a run and its restarts are equal to the last bit by themselves.  On a GPU they are so only up to the order in
which sums are taken: cuDNN picks algorithms by timing them at each start, some operators add with atomics, Inductor
picks kernels by timing, and DALI leaves some images to the JPEG engine and others to a decoder that rounds otherwise.
"""

import os
import re
from typing import Any

import torch

_NO_DETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")


def settle(deterministic: bool) -> None:
    """Have this process compute deterministically, or as fast as it can; before it computes anything on a GPU."""
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic)
    if not deterministic:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may split sums in another way each time
    memory: Any = torch.utils.deterministic
    memory.fill_uninitialized_memory = False  # a help to find bugs, at the price of writing all memory twice
    from torch._inductor import config as inductor  # here: it takes a second

    if hasattr(inductor, "deterministic"):
        inductor.deterministic = True


def decoder_load() -> float:
    """The share of JPEG images that DALI gives to the GPU's decoding engine."""
    return 0.0 if torch.are_deterministic_algorithms_enabled() else 0.75


def explain(error: BaseException) -> str | None:
    """One line about an operator that can only be computed in another way each time; None for another error."""
    found = _NO_DETERMINISTIC.search(str(error)) if isinstance(error, RuntimeError) else None
    if found is None:
        return None
    return (
        f"--deterministic: torch has no deterministic {found.group(1)} for this device, which this run needs: leave "
        "--deterministic out, or take another method, encoder or size"
    )
