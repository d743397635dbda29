"""A network of its own for every node, and one that is cut."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from on_slurm import Cluster, is_undisturbed, slurm, started, submitted

pytestmark = [pytest.mark.slurm]


@pytest.fixture(scope="module")
def networks() -> Iterator[Cluster]:
    with started("--nodes", "3", "--netns") as up:
        yield up


def test_s4_a_node_that_is_cut_off_is_left_behind(
    networks: Cluster, tmp_path: Path, reference: dict[str, torch.Tensor]
) -> None:
    """Slurm notices after half a minute and starts the job on the two nodes that it reaches."""
    run = submitted(tmp_path, "--checkpoint.every", "10")
    run.until_step(25)
    networks.script("cut", "n2")
    is_undisturbed(run, reference, repeated=30)
    assert slurm("scontrol", "show", "job", run.job.id, "-o").split(" NodeList=")[1].split()[0] == "n[1,3]"
