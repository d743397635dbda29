"""What Triton needs of a machine to start its kernels on a GPU, beside the driver: a C compiler and Python's headers.

Triton builds a small module with both at its first use, also where everything comes from wheels.
"""

import os
import shutil
import sysconfig
from pathlib import Path

INSTALL = "apt install gcc python3-dev"


def missing() -> str:
    """What is not there, in words; empty if nothing is missing.

    Looks where Triton looks: ``$CC``, which is taken as the path of one program, else gcc or clang.
    """
    named = os.environ.get("CC")
    names = ["gcc", "clang"] if named is None else [named]
    scheme = sysconfig.get_default_scheme()
    # Debian's own Python installs below "local", where its headers are not.
    include = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    lacks = [] if any(map(shutil.which, names)) else ["a C compiler" if named is None else f"the C compiler CC={named}"]
    if not (Path(include) / "Python.h").exists():
        lacks.append("Python's headers (Python.h)")
    return " and ".join(lacks)
