"""A run for all tests of this folder."""

from pathlib import Path

import pytest

from sslx import cli

PRETRAIN = (
    "simclr_digits --steps 1 --batch-size 32 --data.size 16 --online.every 0 --encoder.channels 8 8 8 16 --name run"
).split()


@pytest.fixture(scope="package")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step."""
    folder = tmp_path_factory.mktemp("runs")
    assert cli.main(["pretrain", *PRETRAIN, "--runs", str(folder)]) == 0
    return folder / "run"
