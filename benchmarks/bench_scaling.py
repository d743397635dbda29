"""Ranks: samples/s on 1 to N, time and bytes in each collective, and what a cost model makes of it.

    python benchmarks/bench_scaling.py simclr_cifar10_cpu --data.backend synthetic --data.source synthetic
    python benchmarks/bench_scaling.py simclr_imagenet --data.source synthetic --data.backend synthetic --batch-size 512
    python benchmarks/bench_scaling.py --extrapolate --compute-ms 120

Flags that are not this script's are those of ``sslx pretrain``.  strong: the recipe's batch is shared; weak: each rank
has all of it.  All numbers of ranks and both kinds take turns, in processes of torchrun; on CPUs each rank has one
thread.  A step is that of a run, on a batch in memory; the slowest rank counts.  Bytes and calls are counted as the
operators are called, seconds by torch's profiler, where they may overlap with computation.  The model
(scaling_model.py) gets this machine's latency and bandwidth from two all-reduces; its error stands beside each
measurement.

--extrapolate prints what it says of 8 to 4,096 GPUs: arithmetic from nominal rates, no measurement.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scaling_model import H200, WORLD_SIZES, Collective, Network, grown, of_shares, step
from torch.profiler import ProfilerActivity, profile

from sslx import config, distributed
from sslx.bench import measure, operators
from sslx.bench.advice import Workload
from sslx.distributed import Ranks
from sslx.machine import cores

RESULTS = Path(__file__).parent / "results" / "scaling.jsonl"
KINDS = "strong", "weak"
SMALL, LARGE = 2, 2**23  # float32 elements of the all-reduces that give latency and bandwidth


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    most = torch.cuda.device_count() or cores.allowed()
    sizes = [size for size in (1, 2, 4, 8) if size <= most]
    parser.add_argument("--world-sizes", type=int, nargs="+", default=sizes)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each world size, in turns")
    parser.add_argument("--window-steps", type=int, default=10, help="of a window")
    parser.add_argument("--windows", type=int, default=4, help="in each process; the first is a warm-up")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--extrapolate", action="store_true", help="from what was measured last, for GPU clusters")
    parser.add_argument("--compute-ms", type=float, help="of a step of one GPU, for --extrapolate")
    parser.add_argument("--worker", choices=["strong", "weak"], help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    if args.worker:
        work(args, flags)
    elif args.extrapolate:
        extrapolate(args)
    else:
        compare(args, flags)


def work(args: argparse.Namespace, flags: list[str]) -> None:
    """Be one rank; the first prints what all measured."""
    settings = config.load(flags)
    ranks = distributed.init(settings.device)
    if ranks.device.type == "cpu":
        torch.set_num_threads(1)
    if args.worker == "weak":
        settings = replace(settings, batch_size=settings.batch_size * ranks.world_size)
    recipe = Workload(settings, ranks)
    windows = [slowest(lambda: [recipe.step() for _ in range(args.window_steps)], ranks) / args.window_steps
               for _ in range(args.windows)][1:]  # fmt: skip
    found: dict[str, Any] = {"step_s": windows, "batch_size": settings.batch_size}
    found |= {"precision": str(recipe.matrix_dtype()).removeprefix("torch."), "threads": torch.get_num_threads()}
    found |= {"collectives": collectives(recipe, ranks, args.window_steps), "network": network(ranks)}
    if ranks.is_main:
        print(json.dumps(found))
    distributed.shutdown()


def slowest(call: Callable[[], object], ranks: Ranks) -> float:
    """Seconds of the rank that takes longest, all starting together."""
    distributed.barrier()
    return max(distributed.gather_objects(measure.elapsed_s(call, ranks.device)))


def collectives(recipe: Workload, ranks: Ranks, steps: int) -> list[dict[str, Any]]:
    """Calls and bytes a step of each kind of collective, and the seconds that all kinds take."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ranks.device.type == "cuda" else [])]
    with profile(activities=activities) as trace:
        for _ in range(steps):
            recipe.step()
    spent = {
        event.key: max(event.device_time_total, event.cpu_time_total) / 1e6 / steps
        for event in trace.key_averages()
        if event.key.startswith(("gloo:", "nccl"))
    }
    with recipe.eager():
        calls = counted(recipe.step, ranks)
    return [*calls, {"name": "seconds", "by_kind": spent}]


def counted(step: Callable[[], object], ranks: Ranks) -> list[dict[str, Any]]:
    """Calls and bytes of each kind of collective; a buffer counts once, whole: what is reduced, or what is gathered."""
    whole = ranks.world_size / (ranks.world_size + 1)  # this rank's own rows were counted beside the whole
    return [
        {"name": c.name.partition(".")[2], "calls": c.calls, "nbytes": c.nbytes * (whole if of_shares(c.name) else 1)}
        for c in operators.costs(step, ranks.device)
        if c.name.startswith(("c10d", "_c10d"))
    ]


def network(ranks: Ranks) -> dict[str, float]:
    """This machine's seconds of a small all-reduce, and bytes/s on the wire of a large one."""
    if ranks.world_size == 1:
        return {}
    found: dict[int, float] = {}
    for size in (SMALL, LARGE):
        x = torch.randn(size, device=ranks.device)
        times = [slowest(lambda x=x: distributed.sum_over_ranks(x), ranks) for _ in range(8)][1:]
        copying = [slowest(lambda x=x: x.clone(), ranks) for _ in range(8)][1:]  # which the sum does first
        found[size] = measure.summarize(times)["median"] - measure.summarize(copying)["median"]
    wire = 2 * (ranks.world_size - 1) / ranks.world_size * 4 * LARGE
    return {"latency_s": found[SMALL], "bytes_per_s": wire / (found[LARGE] - found[SMALL])}


def compare(args: argparse.Namespace, flags: list[str]) -> None:
    """Take turns, print and record."""
    settings = config.load(flags)
    whole = json.loads(config.dump(settings))
    sizes: list[int] = args.world_sizes
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {(kind, size): [] for kind in KINDS for size in sizes}
    for _ in range(args.rounds):
        for size in sizes:
            for kind in KINDS if size > 1 else KINDS[:1]:  # one rank: the same job
                try:
                    runs[kind, size].append(launched(args, kind, size, flags))
                except (subprocess.CalledProcessError, ValueError, IndexError) as error:  # the others go on
                    print(f"{kind}, {size} ranks: left out ({error})")
    for kind in KINDS:
        alone = runs.get((KINDS[0], 1))
        for size in sizes:
            found = runs[kind, size] or runs[KINDS[0], size]
            if not found:
                continue
            record: dict[str, Any] = {"benchmark": "scaling", "recipe": settings.name, "kind": kind, "world_size": size}
            record |= {"step_s": measure.summarize([s for run in found for s in run["step_s"]])}
            record |= {key: found[-1][key] for key in ("batch_size", "collectives", "network")}
            record |= {"device": "cuda" if torch.cuda.is_available() else "cpu", "config": whole}
            record |= {"precision": found[-1]["precision"], "threads_a_rank": found[-1]["threads"]}
            if alone and size > 1:
                alone_s = measure.summarize([s for run in alone for s in run["step_s"]])["median"]
                record |= predicted(record, alone_s, size)
            show(record)
            if not args.no_record:
                measure.append(args.results, record)


def launched(args: argparse.Namespace, kind: str, size: int, flags: list[str]) -> dict[str, Any]:
    """One torchrun of this script's ``work``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), __file__]
    command += ["--worker", kind, "--window-steps", str(args.window_steps), "--windows", str(args.windows), *flags]
    here = os.environ | {"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99"}  # the profiler looks for GPUs aloud
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=here)
    return json.loads(out.stdout.splitlines()[-1])


def predicted(record: dict[str, Any], alone_s: float, size: int) -> dict[str, Any]:
    """The model's least and most seconds of this step, and how far it is off."""
    here = record["network"]
    latency, rate = here["latency_s"], here["bytes_per_s"]
    machine = Network(size, rate, rate, (latency, 0.0, 0.0), (latency, 0.0, 0.0))
    compute_s = alone_s / size if record["kind"] == "strong" else alone_s
    least, most = step(compute_s, kinds(record), size, machine)
    measured = record["step_s"]["median"]
    error = max(0.0, least - measured, measured - most) / measured
    return {"model_s": [least, most], "model_error": error}


def kinds(record: dict[str, Any]) -> list[Collective]:
    return [Collective(c["name"], c["calls"], c["nbytes"] / c["calls"]) for c in record["collectives"] if "calls" in c]


def show(record: dict[str, Any]) -> None:
    found = record["step_s"]
    rate = record["batch_size"] / found["median"]
    print(
        f"{record['kind']:6} {record['world_size']} ranks  {1e3 * found['median']:8.1f} ms a step "
        f"({1e3 * found['p20']:.1f} to {1e3 * found['p80']:.1f})  {rate:9,.1f} samples/s"
    )
    if "model_s" in record:
        low, high = (1e3 * s for s in record["model_s"])
        print(f"         model: {low:.1f} to {high:.1f} ms, off by {100 * record['model_error']:.0f} %")
    for c in record["collectives"]:
        if "calls" in c:
            print(f"         {c['name']:24} {c['calls']:3} calls, {c['nbytes'] / 1e6:9.3f} MB")
        else:
            for name, spent in c["by_kind"].items():
                print(f"         {name:24} {1e3 * spent:9.2f} ms")


def extrapolate(args: argparse.Namespace) -> None:
    """The newest weak measurement on several ranks, taken to clusters of GPUs."""
    lines = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    found = [r for r in lines if r["kind"] == "weak" and r["world_size"] > 1]
    if not found or not args.compute_ms:
        raise SystemExit("--extrapolate needs --compute-ms, and a measurement on two ranks: run this without it first")
    record = found[-1]
    source = f"the collectives of {record['recipe']} on {record['device']}"
    print(f"EXTRAPOLATION, not a measurement: {source}, on DGX H200s, beside {args.compute_ms:g} ms a step of one GPU")
    print(f"a rank's batch: {record['batch_size'] // record['world_size']}; efficiency: compute / step, upper bounds")
    print(f"{'GPUs':>6} {'collectives, ms':>16} {'efficiency':>18}")
    for size in WORLD_SIZES:
        there = grown(kinds(record), record["world_size"], size)
        least, most = step(args.compute_ms / 1e3, there, size, H200)
        low, high = (args.compute_ms / 1e3 / spent for spent in (most, least))
        print(f"{size:6,} {1e3 * (most - args.compute_ms / 1e3):16.2f} {100 * low:10.1f} to {100 * high:.1f} %")


if __name__ == "__main__":
    main()
