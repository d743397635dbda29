"""A network of its own for every node, one that is cut, and a Slurm that preempts by the job's own signal."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kit.on_slurm import Cluster, Run, is_undisturbed, slurm, started, submitted
from kit.processes import until
from sslx.runs import records

pytestmark = [pytest.mark.slurm]


@pytest.fixture(scope="module")
def networks() -> Iterator[Cluster]:
    with started("--nodes", "3", "--netns", "--user-signal") as up:
        yield up


def nodes(run: Run) -> str:
    return slurm("scontrol", "show", "job", run.job.id, "-o").split(" NodeList=")[1].split()[0]


@pytest.mark.timeout(600)
def test_s2_and_s4_a_preempted_run_leaves_a_node_behind_that_is_cut_off(
    networks: Cluster, tmp_path: Path, reference: dict[str, torch.Tensor]
) -> None:
    """Slurm notices after half a minute and starts the job on the two nodes that it reaches."""
    run = submitted(tmp_path, "--checkpoint.every", "10")
    run.until_step(5)
    slurm("sbatch", *"--partition high --nodes 3 --exclusive --output /dev/null --wrap".split(), "srun sleep 1")
    until(lambda: bool(records.read_stops(run.folder)), "preemption")
    (stop,) = records.read_stops(run.folder)
    assert (stop.reason, stop.step >= 5) == ("SIGUSR2", True)
    run.until_step(stop.step + 12)
    assert run.repeated() == 0
    assert nodes(run) == "n[1-2]"
    networks.script("cut", "n2")
    is_undisturbed(run, reference, repeated=10)
    assert nodes(run) == "n[1,3]"
