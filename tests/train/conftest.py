"""A run of ``sslx pretrain`` in the test's own process."""

from pathlib import Path

import pytest

from kit.runs import Run


@pytest.fixture
def here(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(tmp_path, capfd)
