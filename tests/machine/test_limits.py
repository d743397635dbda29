"""What the system does not grant, said in one line: real limits, real errors."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kit.processes import TINY, Record, is_one_line
from kit.python import python
from sslx.errors import DataError
from sslx.machine import limits


def sslx(limit: str, *argv: str, folder: Path) -> str:
    """What a command says on stderr under ``ulimit``, which it must end by, with 64."""
    shell = ["bash", "-c", f'ulimit {limit} && exec "$@"', "bash", sys.executable, "-m", "sslx", *argv]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=300, check=False, cwd=folder)
    assert done.returncode == 64, done.stderr
    return done.stderr


@pytest.mark.parametrize("gigabytes", [0.5, 1.5, 2.5, 3.0, 3.5, 5.0])
def test_too_little_address_space_is_refused_before_libraries_meet_it(
    tmp_path: Path, gigabytes: float, record_property: Record
):
    for command in ("pretrain", "probe"):
        said = sslx(f"-v {int(gigabytes * 2**20)}", command, *TINY, folder=tmp_path)
        is_one_line(said, "GiB of address space, which", f"got a limit of {gigabytes} GiB (ulimit -v)")
    record_property("figure", f"ulimit -v {gigabytes} GiB: exit code 64, one line")


def test_an_allocation_that_fails_is_named_with_its_size():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)  # more than the address space of a process
    assert "out of host memory (33554432.00 GiB requested at once)" in (limits.explain(caught.value) or "")
    assert "out of host memory: " in (limits.explain(MemoryError()) or "")


def test_what_an_error_comes_from_counts_too():
    error = DataError("the loader failed on readable files")
    error.__cause__ = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 433520640 bytes")
    assert "out of host memory (0.40 GiB requested at once)" in (limits.explain(error) or "")


@pytest.mark.parametrize(
    "error", [ValueError("a"), RuntimeError("mat1 and mat2 shapes"), OSError(2, "No such file"), KeyError("x")]
)
def test_other_errors_are_not_of_limits(error: Exception):
    assert limits.explain(error) is None


OPEN_FILES = """
import resource
from sslx.machine import limits
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (30, hard))
limits.raise_file_limit()
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
files = []
try:
    while True:
        files.append(open("/dev/null"))
except OSError as error:
    words = limits.explain(error)
del files
print(words)
"""


def test_a_soft_limit_on_open_files_is_raised_to_the_hard_one_and_a_low_one_is_named():
    words = python("-c", OPEN_FILES).stdout
    assert words.startswith("too many open files: this process may open 20 (ulimit -n): raise")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_batch_that_does_not_fit_ends_in_one_line(tmp_path: Path, ranks: int):
    """Of the views alone it takes 100 GB."""
    huge = f"--data.size 1024 --source.num-samples 4096 --batch-size 4096 --ranks {ranks}".split()
    said = sslx(f"-v {12 * 2**20}", "pretrain", *TINY, *huge, folder=tmp_path)
    is_one_line(said, "out of host memory", "12.0 GiB", "--batch-size")


@pytest.mark.slow
def test_a_run_with_too_few_open_files_ends_in_one_line(tmp_path: Path):
    said = sslx("-n 20", "pretrain", *TINY, "--ranks", "2", folder=tmp_path)
    is_one_line(said, "at least 64 open files per process, got a limit of 20 (ulimit -Hn)")
