"""``sslx doctor``: one row for each thing that sslx uses, whatever is missing."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from kit.python import python
from sslx import cli
from sslx.commands import doctor
from sslx.machine import versions


def test_it_prints_what_is_there_and_ends_with_0(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = out.splitlines()
    assert max(map(len, rows)) <= 80
    for name in ("python", "cpu", "gpu", "compiler", "slurm", *versions.TESTED):
        assert sum(row.startswith(f"{name} ") for row in rows) == 1, name


def test_help_and_wrong_arguments(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["doctor", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: sslx doctor")
    assert cli.main(["doctor", "now"]) == 64


def test_what_is_missing_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(versions.TESTED, "no-such-package", ("1", "2"))
    monkeypatch.setenv("PATH", str(tmp_path))
    found = dict(doctor.findings())
    assert found["no-such-package"] == "not installed: pip install no-such-package"
    assert found["torch"][0].isdigit()
    assert "apt install g++ python3-dev: without it, no torch.compile on the CPU" in found["compiler"]
    assert "apt install gcc python3-dev: without a C compiler" in found["compiler"]
    assert "no fused loss on a GPU" in found["compiler"]
    assert found["slurm"] == "not installed: jobs run on this machine"


def test_the_drivers_cuda_version_is_a_number_or_none():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert doctor.driver_cuda() is None
        assert "everything runs on the CPU" in dict(doctor.findings())["gpu"]
    else:
        version = doctor.driver_cuda()
        assert isinstance(version, int)
        assert 9 <= version <= 99


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
@pytest.mark.parametrize(("version", "status", "expected"), [(12040, 0, 12), (13000, 0, 13), (12040, 3, None)])
def test_an_old_driver_is_told_which_wheels_to_take(tmp_path: Path, version: int, status: int, expected: int | None):
    """A driver library that answers as the one of CUDA 12 does, loaded in a process of its own."""
    (tmp_path / "cuda.c").write_text(f"int cuDriverGetVersion(int *v) {{ *v = {version}; return {status}; }}")
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "cuda.c"], check=True)
    code = "from sslx.commands import doctor; print(doctor.driver_cuda())"
    assert python("-c", code, LD_LIBRARY_PATH=str(tmp_path)).stdout.strip() == str(expected)
