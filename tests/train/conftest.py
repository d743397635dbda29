"""A run of ``sslx pretrain`` in the test's own process."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kit import words
from kit.processes import TINY
from sslx import cli

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def here(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """``here("--flag", ...)`` -> (exit code, stderr) of one rank in this process; runs go to tmp_path."""

    def run(*flags: str | Path) -> tuple[int, str]:
        capfd.readouterr()
        code = cli.main(["pretrain", *TINY, "--runs", str(tmp_path), "--name", "r", *map(str, flags)])
        return code, words.own(capfd.readouterr().err)

    return run
