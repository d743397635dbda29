"""A real Slurm (slurm/local_cluster.sh, in a folder and on ports of its own), and runs of a tiny encoder on it."""

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import sslx
from kit.processes import TINY, metrics, until
from sslx import cli
from sslx.cluster import jobs
from sslx.runs import checkpoint, records

ROOT = Path(sslx.__file__).parents[1]
SCRIPT = ROOT / "slurm" / "local_cluster.sh"
ALLOCATION = (
    "--nodes 2 --partition low --cpus-per-rank 1 --mem-gb 1 --time 10 --signal-delay-s 60 --give-up-s 6".split()
)
STEPS = 120
SMALL = [*TINY, *f"--data.backend dali --data.threads 1 --steps {STEPS} --optim.lr 0.01".split()]


class Cluster:
    """Two virtual nodes (or three, with networks of their own), and runs that are submitted to them."""

    def __init__(self, folder: Path, port: int, *flags: str) -> None:
        self.environ = {"SSLX_CLUSTER": str(folder), "SSLX_CLUSTER_PORT": str(port)}
        self.flags = flags

    def script(self, *argv: str) -> None:
        done = subprocess.run(
            ["bash", SCRIPT, *argv],
            env=os.environ | self.environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def __enter__(self) -> "Cluster":
        self.script("start", *self.flags)
        os.environ["SLURM_CONF"] = f"{self.environ['SSLX_CLUSTER']}/slurm.conf"
        os.environ["OMP_NUM_THREADS"] = "1"
        return self

    def __exit__(self, *_: object) -> None:
        self.script("stop")
        del os.environ["SLURM_CONF"]


@contextmanager
def started(*flags: str) -> Iterator[Cluster]:
    """A cluster in a fresh folder; skips the test where there can be none."""
    if os.geteuid() or not shutil.which("slurmctld"):
        pytest.skip("needs root and slurmctld: bash tests/run.sh --slurm")
    folder = Path(tempfile.mkdtemp(prefix="sslx-cluster-"))  # munge wants every parent open to all: no tmp_path
    with Cluster(folder, 17_000, *flags) as up:
        yield up


def slurm(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True).stdout.strip()


def submitted(runs: Path, *flags: str, allocation: Sequence[str] = ALLOCATION) -> "Run":
    """``sslx submit`` of the run runs/r on two nodes."""
    assert cli.main(["submit", *allocation, "--", *SMALL, "--runs", str(runs), "--name", "r", *flags]) == 0
    job = records.read_job(runs / "r")
    assert job is not None
    return Run(runs / "r", job)


class Run:
    """A run that was submitted."""

    def __init__(self, folder: Path, job: records.Job) -> None:
        self.folder, self.job, self.submitted = folder, job, time.time()

    @property
    def log(self) -> str:
        path = Path(self.job.log)
        return path.read_text() if path.exists() else ""

    @property
    def step(self) -> int:
        return int(records.last_metrics(self.folder / "metrics.jsonl").get("step", 0))

    @property
    def state(self) -> str:
        return jobs.current_job_state(self.job)

    def until_step(self, step: int) -> None:
        until(lambda: self.step >= step or self._gone(), f"step {step}")
        assert self.step >= step, self.log + Path("/etc/hosts").read_text()

    def _gone(self) -> bool:
        return time.time() - self.submitted > 3 and not self.state

    def finish(self, timeout_s: float = 300) -> records.Status:
        """Wait until Slurm has no such job any more; returns the run's status."""
        deadline = time.monotonic() + timeout_s
        while self.state:
            assert time.monotonic() < deadline, f"{self.state} after {timeout_s} s: {self.log}"
            time.sleep(0.1)
        status = records.read_status(self.folder)
        assert status is not None, self.log
        return status

    def rank(self, number: int) -> int:
        """The pid of a rank of the running job."""
        wanted = {f"SLURM_JOB_ID={self.job.id}".encode(), f"SLURM_PROCID={number}".encode()}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if wanted <= set((path / "environ").read_bytes().split(b"\0")):
                    if b"submitit" in (path / "cmdline").read_bytes():
                        return int(path.name)
            except OSError:
                continue
        raise AssertionError(f"no rank {number} of job {self.job.id}")

    def signal(self, name: str) -> None:
        slurm("scancel", "--signal", name, self.job.id)

    def repeated(self) -> int:
        """Steps that were trained more than once."""
        said = re.findall(r"^step +(\d+)/", self.log, re.MULTILINE)
        return len(said) - len(set(said))

    def is_complete(self) -> None:
        assert [line["step"] for line in metrics(self.folder)] == list(range(1, STEPS + 1))

    def weights(self) -> dict[str, torch.Tensor]:
        return checkpoint.load(self.folder)["method"]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bitwise."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def is_undisturbed(run: Run, reference: dict[str, torch.Tensor], repeated: int = 0) -> None:
    """It is done, with the weights of the reference, and has repeated so many steps at most."""
    status = run.finish()
    assert (status.state, status.step) == ("done", STEPS), run.log
    run.is_complete()
    assert equal(run.weights(), reference)
    assert run.repeated() <= repeated, run.log
