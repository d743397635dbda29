"""Which code runs: whoever changes a file of sslx has another version."""

import shutil
from pathlib import Path

import pytest

import sslx
from sslx.machine import code_version


def test_the_code_version_changes_with_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = code_version.code_version()
    package = Path(sslx.__file__).parent
    shutil.copytree(package, tmp_path / "sslx", ignore=shutil.ignore_patterns("__pycache__"))
    copy = tmp_path / Path(code_version.__file__).relative_to(package.parent)
    monkeypatch.setattr(code_version, "__file__", str(copy))
    assert code_version.code_version().split()[-1] == original.split()[-1]
    (tmp_path / "sslx" / "train" / "another.py").write_text("# another file\n")
    assert code_version.code_version().split()[-1] != original.split()[-1]
