"""The cluster, and the weights that no interruption may change."""

from collections.abc import Iterator

import pytest
import torch

from kit.on_slurm import SMALL, Cluster, started
from kit.processes import outside
from sslx.runs import checkpoint


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two virtual nodes."""
    with started() as up:
        yield up


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of an undisturbed run, on two ranks without Slurm."""
    folder = tmp_path_factory.mktemp("reference")
    code, out, err = outside(folder, *SMALL, "--ranks", "2")
    assert code == 0, out + err
    return checkpoint.load(folder / "r")["method"]
