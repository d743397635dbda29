"""A job on a real Slurm of this machine: time to submit it, to start it, to stop it, and to continue it.

    bash slurm/local_cluster.sh start --nodes 2 && eval "$(bash slurm/local_cluster.sh env)"
    python benchmarks/run.py slurm

Each round submits a tiny SimCLR on two virtual nodes with one rank each (gloo), sends it SIGUSR2 after its tenth step,
and waits until it continues.  Two times are reported separately: Slurm's own delay before a requeued job may start, and
the import of torch, which is most of what ``sslx submit`` takes.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import images
from harness import Session, benchmark, option

from sslx.bench import measure
from sslx.cluster import jobs
from sslx.runs import records

JOB = (
    "--source.num-samples 64 --data.size 16 --data.threads 1 --encoder.layers 1 1 1 1 --encoder.channels 8 8 8 8 "
    "--method.hidden-dim 16 --method.projection-dim 8 --batch-size 16 --steps 100000 "
    "--optim.name sgd --log.every 1 --online.every 0 --device cpu --precision fp32 --checkpoint.every 0"
).split()
ALLOCATION = "--nodes 2 --cpus-per-rank 1 --mem-gb 1 --time 10 --signal-delay-s 60".split()
LIMITS = {"command_s": 3.0, "queued_to_first_step_s": 12.0, "running_to_first_step_s": 12.0}


@benchmark(
    option("--rounds", type=int, default=5, help="number of jobs that count"),
    option("--runs", type=Path, default=Path("runs"), help="folder of the run"),
)
def run(session: Session) -> bool:
    folder = session.options.runs / "bench_slurm"
    rounds = [one_round(folder) for _ in range(session.options.rounds + 1)][1:]  # the first fills the file cache
    seconds = {name: measure.summarize([times[name] for times in rounds]) for name in rounds[0]}
    session.record(nodes=2, seconds=seconds, limits=LIMITS)
    for name, summary in seconds.items():
        limit = f"   (limit {LIMITS[name]:g} s)" if name in LIMITS else ""
        print(f"{name:28} {measure.text(summary, 2)} s{limit}")
    return all(seconds[name]["median"] < limit for name, limit in LIMITS.items())


def one_round(folder: Path) -> dict[str, float]:
    """Submit a job, interrupt it once and let it continue; return durations in seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "sslx", "submit", *ALLOCATION, "--", *JOB, *images.flags("synthetic")]
    before = time.time()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)  # most of the command's time
    imported = time.time()
    place = ["--runs", str(folder.parent), "--name", folder.name]
    subprocess.run([*command, *place], check=True, stdout=subprocess.DEVNULL)
    submitted = time.time()
    job = records.read_job(folder)
    assert job is not None
    wait_for(lambda: last_step(folder) >= 10)
    started = started_at(job.id)
    signalled = time.time()
    subprocess.run(["scancel", "--signal", "USR2", job.id], check=True)
    wait_for(lambda: bool(records.read_stops(folder)))
    (stop,) = records.read_stops(folder)
    wait_for(lambda: last_step(folder) > stop.step + 1)
    restarted = started_at(job.id)
    subprocess.run(["scancel", job.id], check=True)
    wait_for(lambda: not jobs.current_job_state(job))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged_at = {line["step"]: line["time"] for line in lines}
    return {
        "import_torch_s": imported - before,
        "command_s": submitted - imported,
        "queued_to_first_step_s": logged_at[1] - job.submitted,
        "running_to_first_step_s": logged_at[1] - started,
        "signal_to_end_of_step_s": stop.time - signalled,
        "requeue_delay_s": restarted - stop.time,
        "restarted_to_first_step_s": logged_at[stop.step + 1] - restarted,
    }


def last_step(folder: Path) -> float:
    """The last step in the log of a run."""
    return records.last_metrics(folder / "metrics.jsonl").get("step", 0)


def started_at(job: str) -> float:
    """Unix time, in whole seconds, at which Slurm says that the job started."""
    shown = subprocess.run(["scontrol", "show", "job", job, "-o"], check=True, capture_output=True, text=True).stdout
    match = re.search(r" StartTime=(\S+)", shown)
    assert match
    return time.mktime(time.strptime(match[1], "%Y-%m-%dT%H:%M:%S"))


def wait_for(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"the job made no progress for {timeout_s:g} s")
        time.sleep(0.05)
