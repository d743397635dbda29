"""Runs of a tiny encoder in this process, and what a run folder says of itself."""

from pathlib import Path

import pytest

from kit import words
from kit.processes import metrics, pretrain
from sslx import cli
from sslx.runs import records


class Run:
    """``here("--flag", ...)`` -> (exit code, stderr) of the run folder/r, of one rank in this process."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capfd = folder, capfd
        self.out = ""
        """What the last run said on stdout."""

    def __call__(self, *flags: str | Path) -> tuple[int, str]:
        self.capfd.readouterr()
        code = cli.main(pretrain(self.folder, *flags))
        self.out, err = self.capfd.readouterr()
        return code, words.own(err)


def status_of(folder: Path) -> records.Status:
    """What the status.json of folder/r says."""
    status = records.read_status(folder / "r")
    assert status is not None
    return status


def steps_of(folder: Path) -> list[float]:
    """The steps in the log of folder/r."""
    return [line["step"] for line in metrics(folder / "r")]


def losses(run: Path) -> list[tuple[float, float]]:
    """(step, loss) of each line in the log of a run folder."""
    return [(line["step"], line["loss"]) for line in metrics(run)]
