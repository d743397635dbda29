"""What glibc does with the memory of freed tensors."""

import ctypes
import functools
import sys


@functools.cache
def keep_freed() -> None:
    """Have glibc reuse freed memory from now on instead of giving it back to the kernel after every use.

    Large tensors are otherwise mapped, faulted in page by page and unmapped in each step: on 2 CPU cores that took
    half of a ResNet's step.  To be called after a first step: what outlives a step then lies together, and not between
    tensors that come and go, which would keep their places from growing together (a tenth of the peak).
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped on its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
