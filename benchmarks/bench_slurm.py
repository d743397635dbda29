"""A job on a real Slurm of this machine: how long it takes to submit, to start, to save, and to go on.

    bash slurm/local_cluster.sh start --nodes 2 && eval "$(bash slurm/local_cluster.sh env)"
    python benchmarks/bench_slurm.py

A tiny SimCLR on two virtual nodes, one rank each, gloo; each round submits it, sends it SIGUSR2 at its tenth step,
and waits for it to go on.  Slurm's own delay before a requeued job may start is reported apart, and so is the import of
torch, most of what ``sslx submit`` takes.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from sslx.bench import measure
from sslx.cluster import jobs
from sslx.runs import records

RESULTS = Path(__file__).parent / "results" / "slurm.jsonl"
RUN = (
    "--data.source synthetic --data.num-synthetic 64 --data.size 16 --data.threads 1 --encoder.layers 1 1 1 1 "
    "--encoder.channels 8 8 8 8 --method.hidden-dim 16 --method.projection-dim 8 --batch-size 16 --steps 100000 "
    "--optim.name sgd --log.every 1 --online.every 0 --device cpu --precision fp32 --checkpoint.every 0"
).split()
ALLOCATION = "--nodes 2 --cpus-per-rank 1 --mem-gb 1 --time 10 --signal-delay-s 60".split()
LIMITS = {"command_s": 3.0, "queued_to_first_step_s": 12.0, "running_to_first_step_s": 12.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    rounds = [one(args.runs / "bench_slurm") for _ in range(args.rounds + 1)][1:]  # the first warms the file cache
    seconds = {name: measure.spread([found[name] for found in rounds]) for name in rounds[0]}
    measure.append(args.results, {"benchmark": "slurm", "nodes": 2, "seconds": seconds, "limits": LIMITS})
    for name, found in seconds.items():
        limit = f"   (at most {LIMITS[name]:g})" if name in LIMITS else ""
        print(f"{name:28} {found['median']:6.2f} s   p20 {found['p20']:.2f}  p80 {found['p80']:.2f}{limit}")
    return 0 if all(seconds[name]["median"] < limit for name, limit in LIMITS.items()) else 1


def one(folder: Path) -> dict[str, float]:
    """Submit, interrupt and resume once; durations in seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "sslx", "submit", *ALLOCATION, "--", *RUN, "--runs", str(folder.parent)]
    before = time.time()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)  # the largest part of the command
    imported = time.time()
    subprocess.run([*command, "--name", folder.name], check=True, stdout=subprocess.DEVNULL)
    submitted = time.time()
    job = records.read_job(folder)
    assert job is not None
    wait_for(lambda: records.last_metrics(folder / "metrics.jsonl").get("step", 0) >= 10)
    started = started_at(job.id)
    signalled = time.time()
    subprocess.run(["scancel", "--signal", "USR2", job.id], check=True)
    wait_for(lambda: bool(records.read_stops(folder)))
    (stop,) = records.read_stops(folder)
    wait_for(lambda: records.last_metrics(folder / "metrics.jsonl").get("step", 0) > stop.step + 1)
    restarted = started_at(job.id)
    subprocess.run(["scancel", job.id], check=True)
    wait_for(lambda: not jobs.current_job_state(job))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    when = {line["step"]: line["time"] for line in lines}
    return {
        "import_torch_s": imported - before,
        "command_s": submitted - imported,
        "queued_to_first_step_s": when[1] - job.submitted,
        "running_to_first_step_s": when[1] - started,
        "signal_to_end_of_step_s": stop.time - signalled,
        "requeue_delay_s": restarted - stop.time,
        "restarted_to_first_step_s": when[stop.step + 1] - restarted,
    }


def started_at(job: str) -> float:
    """When Slurm says that the job began to run, whole seconds."""
    shown = subprocess.run(["scontrol", "show", "job", job, "-o"], check=True, capture_output=True, text=True).stdout
    found = re.search(r" StartTime=(\S+)", shown)
    assert found
    return time.mktime(time.strptime(found[1], "%Y-%m-%dT%H:%M:%S"))


def wait_for(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"nothing happened for {timeout_s:g} s")
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
