"""Checks for the tools that Triton needs besides the GPU driver: a C compiler and Python's headers.

Triton builds a small module with them at first use, even if everything was installed from wheels.
"""

import os
import shutil
import sysconfig
from pathlib import Path

INSTALL = "apt install gcc python3-dev"


def missing() -> str:
    """Return what is missing, in words, or an empty string.

    Looks where Triton looks: at ``$CC``, which must be the path of one program, or else for gcc or clang.
    """
    cc = os.environ.get("CC")
    compilers = ["gcc", "clang"] if cc is None else [cc]
    scheme = sysconfig.get_default_scheme()
    # Debian's Python installs packages below "local", but its headers are not there.
    include = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    problems: list[str] = []
    if not any(map(shutil.which, compilers)):
        problems.append("a C compiler" if cc is None else f"the C compiler CC={cc}")
    if not (Path(include) / "Python.h").exists():
        problems.append("Python's headers (Python.h)")
    return " and ".join(problems)
