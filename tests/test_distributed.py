"""Ranks: joining them, and what they say to each other, on real gloo ranks."""

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kit.full_batch import RunOnRanks
from sslx import distributed
from sslx.errors import ConfigError, DataError
from sslx.train.stop_flag import StopFlag

CPU = torch.device("cpu")
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


# Joining


@pytest.fixture
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name in LAUNCH_VARIABLES or name.startswith("SLURM_"):
            monkeypatch.delenv(name)


@pytest.mark.usefixtures("_alone")
def test_alone() -> None:
    found = distributed.init("cpu")
    assert found == distributed.Ranks(device=CPU)
    assert found.is_main
    assert distributed.gather_objects("a") == ["a"]
    x = torch.ones(2, 3, requires_grad=True)
    assert torch.equal(distributed.all_gather(x), x)
    assert not distributed.all_gather(x).requires_grad
    assert distributed.all_gather_grad(x).requires_grad
    assert distributed.mean_over_ranks(x).tolist() == x.tolist()
    distributed.check_same(3, "size")
    distributed.barrier()
    distributed.shutdown()


@pytest.mark.usefixtures("_alone")
def test_an_incomplete_environment_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"^expected MASTER_ADDR .* use torchrun$"):
        distributed.init("cpu")


@pytest.mark.usefixtures("_alone")
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"^expected a CUDA GPU .*none is visible.*$"):
        distributed.init("cuda")
    assert distributed.init("auto").device == CPU


@pytest.mark.gpu
@pytest.mark.usefixtures("_alone")
def test_more_local_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "99"), ("WORLD_SIZE", "100"), ("LOCAL_RANK", "99")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"got local rank 99 and .* fewer ranks"):
        distributed.init("cuda")


def _collectives_with_warnings_as_errors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = torch.ones(2, requires_grad=True)
        distributed.all_gather_grad(x).sum().backward()
        distributed.start_all_gather(x)()
        distributed.check_same(1, "number")
        distributed.sum_over_ranks(x)
        distributed.broadcast_object(1)
        distributed.gather_objects(1)
        distributed.barrier()
        flag = StopFlag()
        flag.exchange(0)
        flag.receive()


def test_no_collective_warns(ranks: RunOnRanks) -> None:
    """torch 2.14 renamed all_gather_into_tensor and reduce_scatter_tensor; a newcomer saw the warning twice."""
    ranks(2, _collectives_with_warnings_as_errors)


JOIN = """
import sys, torch
from sslx import distributed
ranks = distributed.init("cpu", timeout_s=30)
seen = distributed.all_gather(torch.tensor([ranks.rank]))
open(f"{sys.argv[1]}/{ranks.rank}", "w").write(f"{ranks.world_size} {ranks.local_rank} {seen.tolist()}")
distributed.barrier()
distributed.shutdown()
"""


def _start(command: list[str], **environ: str) -> subprocess.Popen[str]:
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES and "SLURM" not in k}
    environ = {**clean, "OMP_NUM_THREADS": "1", **environ}
    return subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)


def _by_torchrun(code: str, folder: Path, *argv: str) -> subprocess.Popen[str]:
    (folder / "code.py").write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return _start([*torchrun, str(folder / "code.py"), *argv])


def _by_srun(code: str, folder: Path, step: str = "0") -> list[subprocess.Popen[str]]:
    """Two tasks of a step of a job on this machine."""
    job = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": step}
    job |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost"}
    command = [sys.executable, "-c", code, str(folder)]
    return [_start(command, SLURM_PROCID=rank, SLURM_LOCALID=rank, **job) for rank in "01"]


def _finish(process: subprocess.Popen[str]) -> None:
    try:
        assert process.wait(200) == 0, process.stderr and process.stderr.read()
    finally:
        process.kill()
        process.communicate()


WAIT = """
import sys, time, torch
from sslx import distributed
ranks = distributed.init("cpu", timeout_s=3)
for wait in (distributed.wait_for_main, getattr(distributed, sys.argv[1])):
    began = time.monotonic()
    if ranks.is_main:
        time.sleep(8)
    wait()
    assert time.monotonic() - began > 4
distributed.shutdown()
"""


@pytest.mark.slow
@pytest.mark.parametrize("wait", ["wait_for_main", "barrier"])
def test_ranks_wait_for_the_main_one_longer_than_a_collective_would(tmp_path: Path, wait: str) -> None:
    """As while rank 0 alone fits a probe; a barrier gives up after the seconds that are set, here 3."""
    process = _by_torchrun(WAIT, tmp_path, wait)
    _, err = process.communicate(timeout=200)
    assert (process.returncode == 0) is (wait == "wait_for_main"), err


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    _finish(_by_torchrun(JOIN, tmp_path, str(tmp_path)))
    assert [(tmp_path / r).read_text() for r in "01"] == ["2 0 [0, 1]", "2 1 [0, 1]"]


@pytest.mark.slow
def test_srun(tmp_path: Path) -> None:
    for task in _by_srun(JOIN, tmp_path):
        _finish(task)
    assert [(tmp_path / r).read_text() for r in "01"] == ["2 0 [0, 1]", "2 1 [0, 1]"]


# What ranks say to each other


def gathers(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each rank weighs all ranks' rows by its own rank + 1; the gradient comes through a transposed view."""
    rank = distributed.rank()
    leaf = values[rank].clone().requires_grad_()
    gathered = distributed.all_gather_grad(leaf)
    weights = torch.arange(gathered.numel(), dtype=values.dtype).view(gathered.shape[::-1]).T * (rank + 1)
    (gathered * weights).sum().backward()
    assert leaf.grad is not None
    return distributed.all_gather(leaf.T.contiguous().T), gathered.detach(), leaf.grad, weights / (rank + 1)


@pytest.mark.parametrize("world_size", [2, 3])
def test_gathers(world_size: int, ranks: RunOnRanks, generator: torch.Generator) -> None:
    values = torch.randn(world_size, 4, 3, dtype=torch.float64, generator=generator)
    for rank, (plain, gathered, grad, weights) in enumerate(ranks(world_size, gathers, values)):
        assert torch.equal(plain, values.flatten(0, 1))
        assert torch.equal(gathered, values.flatten(0, 1))
        assert torch.equal(grad, sum(range(1, world_size + 1)) * weights[4 * rank : 4 * rank + 4])


def sums_with_a_gradient(values: Tensor, alike: bool) -> tuple[Tensor, Tensor]:
    leaf = values[distributed.rank()].clone().requires_grad_()
    total = distributed.sum_over_ranks_grad(leaf, equal_grads=alike)
    total.pow(3).sum().backward()
    assert leaf.grad is not None
    return total.detach(), leaf.grad


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_sum_with_a_gradient(world_size: int, alike: bool, ranks: RunOnRanks, generator: torch.Generator) -> None:
    """Every rank takes the same function of the sum: the mean over ranks of x's gradients is that of one process."""
    values = torch.randn(world_size, 4, 3, dtype=torch.float64, generator=generator)
    total = values.sum(0)
    for found, gradient in ranks(world_size, sums_with_a_gradient, values, alike):
        torch.testing.assert_close(found, total)
        torch.testing.assert_close(gradient / world_size, 3 * total**2)


def says() -> tuple[Any, ...]:
    rank = distributed.rank()
    x = torch.tensor([1.0, rank])
    sums = distributed.sum_over_ranks(x).tolist(), distributed.mean_over_ranks(x).tolist(), x.tolist()
    return *sums, distributed.broadcast_object({"from": rank}, src=1), distributed.gather_objects(f"r{rank}")


def test_sums_and_objects(ranks: RunOnRanks) -> None:
    for rank, answer in enumerate(ranks(3, says)):
        assert answer == ([3, 3], [1, 1], [1, rank], {"from": 1}, ["r0", "r1", "r2"])


def checks(mode: Any) -> str:
    with mode:
        distributed.check_same(4, "batch size")
    with pytest.raises(DataError) as raised:
        distributed.check_same(4 if distributed.rank() else 5, "batch size")
    return str(raised.value)


def test_check_same(ranks: RunOnRanks, no_host_sync: Any) -> None:
    expected = "expected the same batch size on every rank, got [5, 4] by rank: cut the data evenly"
    assert ranks(2, checks, no_host_sync) == [expected] * 2


def rounds_in_a_loop() -> tuple[list[int], str, str]:
    """Rounds over the hosts that sizes have cost so far; what a rank of another size at the start, and later, says."""
    ask, rank, rounds = distributed._check_same_on_all, distributed.rank(), list[str]()

    def counted(value: int, what: str, group: distributed.Group) -> None:
        rounds.append(what)
        ask(value, what, group)

    counts, later = list[int](), ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "_check_same_on_all", counted)
        with distributed.steady_sizes():
            for size in (4, 4, 4):
                distributed.check_same(size, "batch size")
                distributed.check_same(2 * size, "other size")
                counts.append(len(rounds))
            try:
                distributed.check_same(4 + rank, "batch size")
            except DataError as error:
                later = str(error)
        for size in (4, 5, 4):
            distributed.check_same(size, "batch size")
        counts.append(len(rounds))
        with distributed.steady_sizes(), pytest.raises(DataError) as raised:
            distributed.check_same(4 + rank, "batch size")
    return counts, later, str(raised.value)


def test_in_a_loop_sizes_cost_one_round_and_none_may_change(ranks: RunOnRanks) -> None:
    """The rank that differs says so before it sends a row; from the start on, all say so."""
    first = "expected the same batch size on every rank, got [4, 5] by rank: cut the data evenly"
    later = "expected the same batch size at every step, got 4 before and now 5 on rank 1: cut the data evenly"
    assert ranks(2, rounds_in_a_loop) == [([2, 2, 2, 5], "", first), ([2, 2, 2, 5], later, first)]


ENDS = """
import sys, time, torch
import torch.distributed as dist
from sslx import distributed, losses
from sslx.errors import DataError
from sslx.train.launch import lost_peer
from sslx.train.stop_flag import StopFlag
ranks = distributed.init("cpu", timeout_s=300)
flag, words = StopFlag(), "all is well"
try:
    with distributed.steady_sizes():
        for step in range(3):
            z = torch.randn(3 if ranks.rank == 1 and step == 2 else 4, 8)
            losses.nt_xent(z, z.flip(0))
            flag.exchange(0)
except DataError as error:
    words = str(error)
except RuntimeError as error:
    words = "lost a rank" if lost_peer(error) else str(error)
failed = time.time()
if ranks.rank == 1:  # whose flag is on its way to a rank that waits for rows
    abort = dist.distributed_c10d._abort_process_group
    dist.distributed_c10d._abort_process_group = lambda: time.sleep(60)
    words += f"; leaves a driver that hangs: {not distributed.abandon(0.2)}"
    dist.distributed_c10d._abort_process_group = abort
words += f"; has left: {distributed.abandon()}, {distributed.world_size()} rank"
open(f"{sys.argv[1]}/{ranks.rank}", "w").write(f"{failed}\\n{words}")
"""


@pytest.mark.slow
def test_an_error_on_one_rank_ends_all_promptly(tmp_path: Path) -> None:
    """One rank's batch is short in the third step.  The other's collectives would wait for 300 s."""
    for task in _by_srun(ENDS, tmp_path, step="1")[::-1]:
        _finish(task)
    ended = time.time()
    (_, other), (failed, words) = ((tmp_path / r).read_text().split("\n") for r in "01")
    assert words.startswith("expected the same batch size of NT-Xent at every step, got 4 before and now 3 on rank 1: ")
    assert words.endswith("; leaves a driver that hangs: True; has left: True, 1 rank")
    assert other == "lost a rank; has left: True, 1 rank"
    assert ended - float(failed) < 60


def stops(mode: Any) -> tuple[list[int], int, int]:
    flag = StopFlag()
    with mode:
        agreed = [flag.exchange(2 * (distributed.rank() == 1 and step == 3)) for step in range(6)]
        return agreed, flag.receive(), flag.receive()


def test_one_ranks_flag_stops_all_at_the_same_step(ranks: RunOnRanks, no_host_sync: Any) -> None:
    assert ranks(2, stops, no_host_sync) == [([0, 0, 0, 0, 2, 0], 0, 0)] * 2


def test_the_flag_of_one_rank_counts_at_once() -> None:
    flag = StopFlag()
    assert [flag.exchange(step) for step in (0, 2)] == [0, 2]
    assert flag.receive() == 0
