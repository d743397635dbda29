"""What torch.compile needs on a CPU, a C++ compiler and Python's headers, and what to spare it there and on a GPU."""

import logging
import os
import shlex
import shutil
import sys
import sysconfig
import warnings
from pathlib import Path

INSTALL = "apt install g++ python3-dev"


def cpp() -> str | None:
    """The compiler that Inductor would call, None where it or Python's headers are missing."""
    words = shlex.split(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return shutil.which(words[0]) if words and headers.exists() else None


def keep_precision() -> None:
    """Before torch.compile under autocast: the backward is computed as it would be without, in the forward's dtypes.

    torch traces a backward under the forward's autocast, so that the gradients of what a method computes in fp32 with
    autocast off, as cosines with prototypes, were products in bf16.  Uncompiled, ``backward`` is called outside of it.
    """
    import torch._functorch.config as functorch

    if hasattr(functorch, "backward_pass_autocast"):
        functorch.backward_pass_autocast = "off"


def for_cpu() -> None:
    """Before torch.compile on a CPU: what costs time or memory there and is of no use."""
    os.environ.setdefault("TORCH_WARM_POOL", "0")  # Triton's processes: 80 MB each, and they compete for the cores
    # Six programs, built one after the other to learn whether the compiler knows the CPU's instructions: 10 s.  One
    # that is new enough for torch's own headers (C++20) knows them.
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # a CUDA toolkit without a GPU


def for_gpu() -> None:
    """Before torch.compile on a GPU: products in fp32 are few, and meant to be exact."""
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
