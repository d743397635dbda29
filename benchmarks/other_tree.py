"""Another commit in a worktree of its own, beside this checkout."""

import os
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import images

HERE = Path(__file__).parents[1]
PRELUDE = f"""
import os, sys, time
from sslx import cli, config, distributed
flags = sys.argv[1:]
try:
    config.load(flags)
except (Exception, SystemExit):
    flags = [{images.OLD_FLAGS}.get(flag, flag) for flag in flags]
"""
"""The beginning of a program for either tree: its arguments as ``flags``, under the names that the tree knows."""


@contextmanager
def checkout(commit: str) -> Generator[Path]:
    """Check a commit out, for as long as it is used."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "other"
        subprocess.run(["git", "-C", HERE, "worktree", "add", "--detach", "--quiet", tree, commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", HERE, "worktree", "remove", "--force", tree], check=False)


def environ(tree: Path, threads: int = 1) -> dict[str, str]:
    """The environment of a process that runs the code of ``tree`` and starts in that folder."""
    return os.environ | {"PYTHONPATH": f"{tree}:{tree / 'kernels'}", "OMP_NUM_THREADS": str(threads)}
