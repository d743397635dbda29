"""A recipe's training step beside its loader: the four arms, what of the machine they use, and where the time goes.

    python benchmarks/bench_step.py simclr_cifar10_cpu --data.source folder --data.root DIR
    python benchmarks/bench_step.py simclr_imagenet --data.source synthetic --data.backend synthetic --trace trace.json

Flags that are not this script's are those of ``sslx pretrain``.  In turns: a run end to end, the step alone (a batch in
memory), the loader alone, the augmentation alone (decoded images in memory).  FLOPs are counted from the products and
convolutions that the step calls; MFU is theirs over the rate of large square products, measured here.  The operators
are timed one by one, uncompiled.
"""

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sslx import config, distributed
from sslx.bench import charts, measure, operators
from sslx.bench.advice import Workload, gain, limit

RESULTS = Path(__file__).parent / "results" / "step.jsonl"
TOP = 8
"""Operators that are shown."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--windows", type=int, default=measure.WINDOWS)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a window")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="of the windows; then there are fewer")
    parser.add_argument("--images", default="", help="what the images are, for the record")
    parser.add_argument("--picture", type=Path, help="write a roofline, as PNG or SVG")
    parser.add_argument("--trace", type=Path, help="write torch's profile of three steps, for chrome://tracing")
    parser.add_argument("--beside", default="", help="flags, such as '--compile off': a run with them too, in turns")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-record", action="store_true", help="print only")
    args, flags = parser.parse_known_args()
    settings = config.load(flags)
    ranks = distributed.init(settings.device)
    noise = measure.warn_of_noise(ranks.device, print)
    recipe = Workload(settings, ranks, args.seconds)
    rate, bandwidth = measure.matrix_rate(ranks.device, recipe.matrix_dtype()), measure.memory_rate(ranks.device)
    values = measure.take_turns(
        recipe.arms(),
        args.windows,
        limit_s=args.limit_s,
        failed=lambda name, error: print(f"{name}: left out ({type(error).__name__}: {error})"),
    )
    arms = {name: measure.summarize(samples) for name, samples in values.items()}
    medians = {name: float(found["median"]) for name, found in arms.items()}
    flops = recipe.flops() / settings.batch_size
    record: dict[str, Any] = {"benchmark": "step", "recipe": settings.name, "images": args.images, "noise": noise}
    record |= {key: getattr(settings, key) for key in ("batch_size", "compile", "batch_norm")}
    record |= {"method": settings.method.name, "encoder": asdict(settings.encoder), "device": ranks.device.type}
    record |= {"config": json.loads(config.dump(settings)), "threads": torch.get_num_threads()}
    record |= {"precision": str(recipe.matrix_dtype()).removeprefix("torch."), "views": recipe.views}
    record |= {"size_px": recipe.batches[0].views[0].shape[-1], "samples_per_s": arms, "flops_per_sample": flops}
    record |= {"matrix_flops_per_s": rate, "memory_bytes_per_s": bandwidth, "data_wait": recipe.data_wait(5)}
    record |= {"mfu": {name: flops * medians[name] / rate for name in ("step alone", "end to end") if name in medians}}
    record |= {"peak_bytes": recipe.peak_bytes()}
    with recipe.eager():
        costs = operators.costs(recipe.step, ranks.device)
    record |= {"operators": [asdict(cost) for cost in costs[:TOP]], "operators_s": sum(c.seconds for c in costs)}
    recipe.close()
    if args.beside:
        other = config.load([*flags, *args.beside.split()])
        record |= {
            "beside": {"flags": args.beside, "samples_per_s_ratio": gain(settings, other, ranks, 2 * args.windows)}
        }
    show(record, medians)
    if args.picture:
        roofline(record)(path=args.picture)
    if args.trace:
        trace(recipe, args.trace)
    if not args.no_record:
        measure.append(args.results, record)
    distributed.shutdown()


def show(record: dict[str, Any], medians: dict[str, float]) -> None:
    """What was measured, on the terminal."""
    print(f"{record['recipe']}: {record['method']}, batch {record['batch_size']}, {record['precision']}")
    for name, found in record["samples_per_s"].items():
        mfu = f"   MFU {100 * record['mfu'][name]:.0f} %" if name in record["mfu"] else ""
        print(
            f"  {name:20} {found['median']:10,.1f} samples/s  ({found['p20']:,.1f} to {found['p80']:,.1f})"
            f"  {found['median'] * record['views']:10,.1f} views/s{mfu}"
        )
    if {"end to end", "step alone", "loader alone"} <= medians.keys():
        print(f"limit: {limit(medians)}")
    print(
        f"{record['flops_per_sample'] / 1e9:.2f} GFLOP a sample; products at "
        f"{record['matrix_flops_per_s'] / 1e12:.2f} TFLOP/s, memory at {record['memory_bytes_per_s'] / 1e9:.0f} GB/s; "
        f"waits for data {100 * record['data_wait']:.0f} % of the time; peak memory {record['peak_bytes'] / 2**30:.2f} "
        f"GiB\nwhere {1e3 * record['operators_s']:.0f} ms of a step go, uncompiled, each operator waited for:"
    )
    if found := record.get("beside"):
        ratio = found["samples_per_s_ratio"]
        print(f"with {found['flags']}: {ratio['median']:.2f} x ({ratio['p20']:.2f} to {ratio['p80']:.2f}) end to end")
    for cost in record["operators"]:
        print(
            f"  {cost['name']:36} {100 * cost['seconds'] / record['operators_s']:4.0f} %  {cost['calls']:5} calls"
            f"  {cost['flops'] / cost['seconds'] / 1e9:9,.1f} GFLOP/s"
            f"  {cost['nbytes'] / cost['seconds'] / 1e9:7.1f} GB/s"
        )


def roofline(record: dict[str, Any]) -> partial[None]:
    """The picture of the operators that take longest; takes its ``path``."""
    points = [
        (cost["name"], cost["seconds"] / record["operators_s"], cost["flops"] / cost["nbytes"],
         cost["flops"] / cost["seconds"])
        for cost in record["operators"] if cost["nbytes"] and cost["flops"] and not cost["name"].startswith("sslx")
    ]  # fmt: skip
    title = f"{record['recipe']}: the operators of a step, uncompiled"
    return partial(charts.roofline, points, record["matrix_flops_per_s"], record["memory_bytes_per_s"], title=title)


def trace(recipe: Workload, path: Path) -> None:
    """torch's profile of three steps."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as found:
        for _ in range(3):
            recipe.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(path))


if __name__ == "__main__":
    main()
