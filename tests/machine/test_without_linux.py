"""sslx on a system without what only Linux has: no /proc, no CPU affinity, no fork, no memory files (as on macOS).

A ``sitecustomize`` hides them from every process that a command starts.  torch and others that look for them find none
either, and have answers of their own.
"""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from kit.processes import TINY
from kit.python import python

HIDE = """
import builtins, ctypes, io, multiprocessing, os

for name in ("sched_getaffinity", "sched_setaffinity", "memfd_create", "fork", "posix_fadvise"):
    if hasattr(os, name):
        delattr(os, name)

def without_proc(function):
    def call(path, *args, **kwargs):
        if isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith("/proc"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return function(path, *args, **kwargs)
    return call

builtins.open = io.open = without_proc(open)
for name in ("open", "listdir", "readlink", "stat", "scandir"):
    setattr(os, name, without_proc(getattr(os, name)))
multiprocessing.set_start_method("spawn")
"""


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text(HIDE)
    paths = [str(tmp_path / "hidden"), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": ":".join(filter(None, paths))}


def sslx(environ: dict[str, Any], *argv: str) -> str:
    done = python("-m", "sslx", *argv, **environ)
    assert "Traceback" not in done.stderr
    return done.stdout


def test_they_are_hidden(environ: dict[str, Any]) -> None:
    code = "import os, multiprocessing as m; print(hasattr(os, 'fork'), m.get_start_method(), os.path.exists('/proc'))"
    assert python("-c", code, **environ).stdout.split() == ["False", "spawn", "False"]


@pytest.mark.slow
def test_commands_that_look_at_the_machine(environ: dict[str, Any], tmp_path: Path) -> None:
    assert re.search(r"cpu +\d+ cores", sslx(environ, "doctor"))
    assert "no runs" in sslx(environ, "jobs", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_run_and_what_follows(environ: dict[str, Any], tmp_path: Path, ranks: str) -> None:
    """With worker processes of the loader, killed by nobody, and the run found dead afterwards."""
    flags = [*TINY, "--source.name", "digits", "--data.backend", "torchvision", "--data.threads", "1"]
    runs = ["--runs", str(tmp_path), "--name", "r", "--ranks", ranks]
    sslx(environ, "pretrain", *flags, *runs)
    assert "done" in sslx(environ, "jobs", str(tmp_path))
    sslx(environ, "probe", str(tmp_path / "r"), "--no-baselines")
