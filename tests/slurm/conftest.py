"""The cluster, and the weights that no interruption may change."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from on_slurm import STEPS, Cluster, submitted


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if os.geteuid() or not shutil.which("slurmctld"):
        pytest.skip("needs root and slurmctld: bash tests/run.sh --slurm")
    folder = Path(tempfile.mkdtemp(prefix="sslx-cluster-"))  # munge wants every parent open to all: no tmp_path
    with Cluster(folder, 17_000) as up:
        yield up


@pytest.fixture(scope="session")
def reference(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of an undisturbed run."""
    del cluster
    run = submitted(tmp_path_factory.mktemp("runs"))
    status = run.finish()
    assert (status.state, status.step) == ("done", STEPS), run.log
    run.is_complete()
    return run.weights()
