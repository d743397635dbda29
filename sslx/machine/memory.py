"""Setting of what glibc does with the memory of freed tensors."""

import ctypes
import functools
import sys

import torch


@functools.cache
def reuse_freed(device: torch.device) -> None:
    """Make glibc reuse freed memory instead of returning it to the kernel after each use.

    device: where the steps are computed.  Nothing changes for a GPU, whose steps free no large tensors on the host, so
    that temporary memory of DALI and NCCL is returned.

    Otherwise large tensors are mapped, faulted in page by page and unmapped in each step, which took half of a
    ResNet's step on 2 CPU cores.  Call this after the first step: memory that outlives a step is then contiguous and
    not between short-lived tensors, whose freed memory could not be merged (a tenth of the peak).
    """
    if device.type == "cpu" and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation gets a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
