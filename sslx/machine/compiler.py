"""Settings of torch.compile, and the tools that it needs on a CPU: a C++ compiler and Python's headers."""

import logging
import os
import shlex
import shutil
import sys
import sysconfig
import warnings
from pathlib import Path

INSTALL = "apt install g++ python3-dev"


def find_cpp() -> str | None:
    """Return the compiler that Inductor would call, or None if it or Python's headers are missing."""
    words = shlex.split(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return shutil.which(words[0]) if words and headers.exists() else None


def keep_backward_precision() -> None:
    """Make a compiled backward under autocast use the same dtypes as an uncompiled one.  Call before torch.compile.

    torch traces a backward under the forward's autocast.  Gradients of what a method computes in fp32 with autocast
    off, such as cosines with prototypes, thereby became products in bf16.  Uncompiled, ``backward`` is called outside
    of autocast.
    """
    import torch._functorch.config as functorch

    if hasattr(functorch, "backward_pass_autocast"):
        functorch.backward_pass_autocast = "off"


def configure_for_cpu() -> None:
    """Turn off what costs time or memory on a CPU without being useful there.  Call before torch.compile."""
    os.environ.setdefault("TORCH_WARM_POOL", "0")  # Triton's processes use 80 MB each and compete for the cores
    # To learn whether the compiler knows the CPU's instructions, Inductor builds six programs, which takes 10 s.  A
    # compiler that is new enough for torch's own headers (C++20) knows them.
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    # A CUDA toolkit without a GPU causes warnings.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def configure_for_gpu() -> None:
    """Silence the advice to use TF32: products in fp32 are few and meant to be exact.  Call before torch.compile."""
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
