"""What torch.compile needs on a CPU: a C++ compiler and Python's headers."""

import logging
import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

INSTALL = "apt install g++ python3-dev"


def cpp() -> str | None:
    """The compiler that Inductor would call, None where it or Python's headers are missing."""
    words = shlex.split(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return shutil.which(words[0]) if words and headers.exists() else None


def for_cpu() -> None:
    """Before torch.compile on a CPU: no processes for Triton's kernels, no warning that a CUDA toolkit has no GPU."""
    os.environ.setdefault("TORCH_WARM_POOL", "0")  # they would hold 80 MB, and compete for the cores
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
