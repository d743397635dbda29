"""Several ranks: samples/s on 1 to N, calls, bytes and time of each collective, and the error of a cost model.

    python benchmarks/run.py scaling simclr_cifar10_cpu --data.backend synthetic --source.name synthetic
    python benchmarks/run.py scaling simclr_imagenet --source.name synthetic --data.backend synthetic --batch-size 512
    python benchmarks/run.py scaling --extrapolate --compute-ms 120

Other options are those of ``sslx pretrain``.  strong: the ranks share the recipe's batch; weak: each rank has a whole
one.  All numbers of ranks and both kinds take turns, in processes of torchrun; on CPUs each rank has one thread.  A
step is that of a run, on a batch in memory, and the slowest rank counts.  Calls and bytes are counted as operators are
called; seconds are those of torch's profiler, where they may overlap with computation.  The model (scaling_model.py)
uses the latency and bandwidth of this machine, from two all-reduces; its error is printed with each measurement.

--extrapolate prints what the model says about 8 to 4,096 GPUs: arithmetic from nominal rates, not a measurement.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from harness import RUNNER, Record, Session, benchmark, option
from scaling_model import H200, WORLD_SIZES, Collective, Network, grown, of_shares, step
from torch.profiler import ProfilerActivity, profile

from sslx import config, distributed
from sslx.bench import measure, operators
from sslx.bench.advice import Workload
from sslx.distributed import Ranks
from sslx.machine import cores

KINDS = "strong", "weak"
NUM_GPUS = torch.cuda.device_count()
SMALL, LARGE = 2, 2**23  # float32 elements of the all-reduces that measure latency and bandwidth


@benchmark(
    option(
        "--world-sizes", type=int, nargs="+", default=[n for n in (1, 2, 4, 8) if n <= (NUM_GPUS or cores.allowed())]
    ),
    option("--rounds", type=int, default=3, help="processes of each world size, in turns"),
    option("--window-steps", type=int, default=10, help="steps in a window"),
    option("--extrapolate", action="store_true", help="apply the model to GPU clusters, from the newest measurement"),
    option("--compute-ms", type=float, help="time of a step on one GPU, for --extrapolate"),
    option("--worker", choices=KINDS, help=argparse.SUPPRESS),
    windows=3,
    passes_flags=True,
)
def run(session: Session) -> None:
    if session.options.worker:
        work(session.options, session.flags)
    elif session.options.extrapolate:
        extrapolate(session)
    else:
        compare(session)


def work(options: argparse.Namespace, flags: list[str]) -> None:
    """Be one rank; rank 0 prints what all ranks measured."""
    settings = config.load(flags)
    ranks = distributed.init(settings.device)
    if ranks.device.type == "cpu":
        torch.set_num_threads(1)
    if options.worker == "weak":
        settings = replace(settings, batch_size=settings.batch_size * ranks.world_size)
    workload = Workload(settings, ranks)
    windows = [
        slowest(lambda: [workload.step() for _ in range(options.window_steps)], ranks) / options.window_steps
        for _ in range(options.windows + 1)
    ]
    figures: Record = {"step_s": windows[1:], "batch_size": settings.batch_size}  # the first window is a warm-up
    figures |= {"precision": str(workload.matrix_dtype()).removeprefix("torch."), "threads": torch.get_num_threads()}
    figures |= {"collectives": collectives(workload, ranks, options.window_steps), "network": network(ranks)}
    if ranks.is_main:
        print(json.dumps(figures))
    distributed.shutdown()


def slowest(call: Callable[[], object], ranks: Ranks) -> float:
    """Seconds that the slowest rank needs if all start together."""
    distributed.barrier()
    return max(distributed.gather_objects(measure.elapsed_s(call, ranks.device)))


def collectives(workload: Workload, ranks: Ranks, steps: int) -> list[dict[str, Any]]:
    """Calls and bytes per step of each kind of collective, and the seconds of all kinds."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ranks.device.type == "cuda" else [])]
    with profile(activities=activities) as trace:
        for _ in range(steps):
            workload.step()
    seconds = {
        event.key: max(event.device_time_total, event.cpu_time_total) / 1e6 / steps
        for event in trace.key_averages()
        if event.key.startswith(("gloo:", "nccl"))
    }
    with workload.parts.method.eager():
        calls = counted(workload.step, ranks)
    return [*calls, {"name": "seconds", "by_kind": seconds}]


def counted(step: Callable[[], object], ranks: Ranks) -> list[dict[str, Any]]:
    """Calls and bytes of each kind of collective.  A buffer counts once: the whole that is reduced or gathered."""
    whole = ranks.world_size / (ranks.world_size + 1)  # the operator's bytes also include this rank's own rows
    return [
        {"name": c.name.partition(".")[2], "calls": c.calls, "nbytes": c.nbytes * (whole if of_shares(c.name) else 1)}
        for c in operators.costs(step, ranks.device)
        if c.name.startswith(("c10d", "_c10d"))
    ]


def network(ranks: Ranks) -> dict[str, float]:
    """Seconds of a small all-reduce on this machine, and bytes/s on the wire of a large one."""
    if ranks.world_size == 1:
        return {}
    seconds: dict[int, float] = {}
    for size in (SMALL, LARGE):
        x = torch.randn(size, device=ranks.device)
        times = [slowest(lambda x=x: distributed.sum_over_ranks(x), ranks) for _ in range(8)][1:]
        copying = [slowest(lambda x=x: x.clone(), ranks) for _ in range(8)][1:]  # the sum starts with a copy
        seconds[size] = measure.summarize(times)["median"] - measure.summarize(copying)["median"]
    wire = 2 * (ranks.world_size - 1) / ranks.world_size * 4 * LARGE
    return {"latency_s": seconds[SMALL], "bytes_per_s": wire / (seconds[LARGE] - seconds[SMALL])}


def compare(session: Session) -> None:
    """Measure all world sizes in turns, print and record them."""
    options, settings = session.options, config.load(session.flags)
    sizes: list[int] = options.world_sizes
    runs: dict[tuple[str, int], list[Record]] = {(kind, size): [] for kind in KINDS for size in sizes}
    for _ in range(options.rounds):
        for size in sizes:
            for kind in KINDS if size > 1 else KINDS[:1]:  # both kinds are the same job on one rank
                try:
                    runs[kind, size].append(launched(session, kind, size))
                except (subprocess.CalledProcessError, ValueError, IndexError) as error:  # the others continue
                    print(f"{kind}, {size} ranks: left out ({error})")
    alone = runs.get((KINDS[0], 1))
    for kind in KINDS:
        for size in sizes:
            measured = runs[kind, size] or runs[KINDS[0], size]
            if not measured:
                continue
            figures: Record = {"recipe": settings.name, "kind": kind, "world_size": size, "step_s": step_s(measured)}
            figures |= {key: measured[-1][key] for key in ("batch_size", "collectives", "network")}
            figures |= {"device": "cuda" if NUM_GPUS else "cpu", "config": json.loads(config.dump(settings))}
            figures |= {"precision": measured[-1]["precision"], "threads_a_rank": measured[-1]["threads"]}
            if alone and size > 1:
                figures |= predicted(figures, float(step_s(alone)["median"]), size)
            show(figures)
            session.record(**figures)


def step_s(runs: list[Record]) -> measure.Summary:
    """Seconds of a step over all windows of some runs."""
    return measure.summarize([seconds for run in runs for seconds in run["step_s"]])


def launched(session: Session, kind: str, size: int) -> Record:
    """The figures of one torchrun of ``work``."""
    options = session.options
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command += [str(RUNNER), "scaling", "--worker", kind, "--window-steps", str(options.window_steps)]
    command += ["--windows", str(options.windows), *session.flags]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99"}  # quiet: the profiler looks for GPUs
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environ)
    return json.loads(out.stdout.splitlines()[-1])


def predicted(figures: Record, alone_s: float, size: int) -> Record:
    """The model's least and most seconds of this step, and its relative error."""
    latency, rate = figures["network"]["latency_s"], figures["network"]["bytes_per_s"]
    machine = Network(size, rate, rate, (latency, 0.0, 0.0), (latency, 0.0, 0.0))
    compute_s = alone_s / size if figures["kind"] == "strong" else alone_s
    least, most = step(compute_s, kinds(figures), size, machine)
    measured = figures["step_s"]["median"]
    error = max(0.0, least - measured, measured - most) / measured
    return {"model_s": [least, most], "model_error": error}


def kinds(figures: Record) -> list[Collective]:
    """The collectives of a step, for the model."""
    counts = (each for each in figures["collectives"] if "calls" in each)
    return [Collective(each["name"], each["calls"], each["nbytes"] / each["calls"]) for each in counts]


def show(figures: Record) -> None:
    """Print the figures."""
    rate = figures["batch_size"] / figures["step_s"]["median"]
    ms = measure.text(figures["step_s"], 1, scale=1e3)
    print(f"{figures['kind']:6} {figures['world_size']} ranks  {ms} ms per step  {rate:9,.1f} samples/s")
    if "model_s" in figures:
        low, high = (1e3 * seconds for seconds in figures["model_s"])
        print(f"         model: {low:.1f} to {high:.1f} ms, error {100 * figures['model_error']:.0f} %")
    for each in figures["collectives"]:
        if "calls" in each:
            print(f"         {each['name']:24} {each['calls']:3} calls, {each['nbytes'] / 1e6:9.3f} MB")
        else:
            for name, seconds in each["by_kind"].items():
                print(f"         {name:24} {1e3 * seconds:9.2f} ms")


def extrapolate(session: Session) -> None:
    """Apply the model to clusters of GPUs, from the newest weak measurement on several ranks."""
    compute_ms = session.options.compute_ms
    records = [record for record in session.recorded(kind="weak") if record["world_size"] > 1]
    if not records or not compute_ms:
        raise SystemExit("--extrapolate needs --compute-ms, and a measurement on two ranks: first run without it")
    record = records[-1]
    source = f"the collectives of {record['recipe']} on {record['device']}"
    print(f"EXTRAPOLATION, not a measurement: {source}, on DGX H200s, with {compute_ms:g} ms per step of one GPU")
    print(f"batch per rank: {record['batch_size'] // record['world_size']}; efficiency: compute / step, upper bounds")
    print(f"{'GPUs':>6} {'collectives, ms':>16} {'efficiency':>18}")
    for size in WORLD_SIZES:
        least, most = step(compute_ms / 1e3, grown(kinds(record), record["world_size"], size), size, H200)
        low, high = (compute_ms / 1e3 / seconds for seconds in (most, least))
        print(f"{size:6,} {1e3 * most - compute_ms:16.2f} {100 * low:10.1f} to {100 * high:.1f} %")
