"""What a GPU reports, told from all other errors: out of memory, or a failure after which nothing works on it any more.

torch has types for both, which are RuntimeErrors like a hundred other things; DALI raises plain RuntimeErrors and
MemoryErrors, which only their words tell.
"""

import re

import torch

from sslx.console.words import one_line
from sslx.errors import ConfigError, DeviceError

_MEMORY = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|CUDA allocation failed|cudaErrorMemoryAllocation|"
    r"CUDA_ERROR_OUT_OF_MEMORY|CU(BLAS|DNN|SOLVER|FFT)_STATUS_ALLOC_FAILED|NVJPEG_STATUS_ALLOCATOR_FAILURE"
)
_FAILURE = re.compile(
    r"CUDA error: |CUDA (driver|runtime) API error|\bcudaError[A-Z]\w+|\bCUDA_ERROR_[A-Z]\w+|\bCUBLAS_STATUS_[A-Z]\w+"
)
"""Not the words "CUDA" or "nvJPEG" alone: a decoder's names are in its complaint about a damaged file."""


def of(error: BaseException) -> torch.OutOfMemoryError | torch.AcceleratorError | None:
    """The device's error that this is or comes from; None where it is another one."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, torch.OutOfMemoryError):
            return link
        if isinstance(link, torch.AcceleratorError) or type(link) in (
            RuntimeError,
            MemoryError,
        ):  # not sslx's own kinds
            text = " ".join(str(link).split())
            if match := _MEMORY.search(text):
                return torch.OutOfMemoryError(text[match.start() :])
            if isinstance(link, torch.AcceleratorError):
                return link
            if match := _FAILURE.search(text):
                return torch.AcceleratorError(text[match.start() :])
        link = link.__cause__
    return None


def explain(error: BaseException) -> tuple[str, int] | None:
    """One line about an error of the device, and its exit code; None where it is another error."""
    found = of(error)
    if found is None:
        return None
    reason = one_line(str(found).partition("\n")[0], 300)
    if isinstance(found, torch.OutOfMemoryError):
        return (
            "out of GPU memory: take a smaller --batch-size or --data.size, more --accumulate, or --precision bf16 "
            f"({reason})",
            ConfigError.exit_code,
        )
    return (
        f"a GPU failed ({reason}): nothing computes on it in this process any more; nvidia-smi and the kernel's log "
        "(Xid) may say why, CUDA_LAUNCH_BLOCKING=1 where; start again with --resume auto",
        DeviceError.exit_code,
    )
