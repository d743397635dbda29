"""Tell GPU errors from all others: out of memory, or a failure after which the process cannot use the GPU anymore.

torch has exception types for both, but they are RuntimeErrors like many others.  DALI raises plain RuntimeErrors and
MemoryErrors, which can be recognized only by their messages.
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
"""Just "CUDA" or "nvJPEG" would not do: a decoder's name is in its complaint about a damaged file."""


def find(error: BaseException) -> torch.OutOfMemoryError | torch.AcceleratorError | None:
    """Return the GPU error that an exception is or was caused by, or None."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, torch.OutOfMemoryError):
            return link
        # Subclasses of RuntimeError, such as sslx's own, are not searched.
        if isinstance(link, torch.AcceleratorError) or type(link) in (RuntimeError, MemoryError):
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
    """Explain a GPU error in one line, with its exit code, or return None for other errors."""
    gpu_error = find(error)
    if gpu_error is None:
        return None
    reason = one_line(str(gpu_error).partition("\n")[0], 300)
    if isinstance(gpu_error, torch.OutOfMemoryError):
        return (
            "out of GPU memory: use a smaller --batch-size or --data.size, more --num-micro-batches, or "
            f"--precision bf16 ({reason})",
            ConfigError.exit_code,
        )
    return (
        f"a GPU failed ({reason}): this process cannot use it anymore; nvidia-smi and the kernel's log (Xid) may say "
        "why, and CUDA_LAUNCH_BLOCKING=1 where; start again with --resume auto",
        DeviceError.exit_code,
    )
