"""What glibc does with the memory of freed tensors."""

import ctypes
import functools
import sys

import torch


@functools.cache
def keep_freed(device: torch.device) -> None:
    """Have glibc reuse freed memory from now on instead of giving it back to the kernel after every use.

    device: where the steps are computed.  Nothing is done for a GPU, whose steps free no large tensors on the host:
    what DALI and NCCL take there for a while goes back.

    Large tensors are otherwise mapped, faulted in page by page and unmapped in each step: on 2 CPU cores that took
    half of a ResNet's step.  To be called after a first step: what outlives a step then lies together, and not between
    tensors that come and go, which would keep their places from growing together (a tenth of the peak).
    """
    if device.type == "cpu" and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped on its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
