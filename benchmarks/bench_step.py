"""The training step of a recipe beside its loader: speed of each, share of the machine's speed, and time by operator.

    python benchmarks/run.py step simclr_cifar10_cpu --source.name folder --source.root DIR
    python benchmarks/run.py step simclr_imagenet --source.name synthetic --data.backend synthetic --trace trace.json

Other options are those of ``sslx pretrain``.  Four arms take turns: a run end to end, the step alone (on a batch in
memory), the loader alone, and the augmentation alone (on decoded images in memory).  FLOPs are those of the products
and convolutions in the step; MFU is their rate over that of products of large square matrices, measured here.  The
operators are timed one by one, uncompiled.
"""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from harness import Record, Session, benchmark, option
from torch.profiler import ProfilerActivity, profile

from sslx import config, distributed
from sslx.bench import charts, measure, operators
from sslx.bench.advice import Workload, gain, limit

NUM_OPERATORS = 8
"""Number of operators that are recorded and shown."""


@benchmark(
    option("--limit-s", type=float, default=float("inf"), help="longest time for all windows; then there are fewer"),
    option("--images", default="", help="name of the images, for the record"),
    option("--picture", type=Path, help="write a roofline, as PNG or SVG"),
    option("--trace", type=Path, help="write torch's profile of three steps, for chrome://tracing"),
    option("--beside", default="", help="options such as '--compile off', for a second run that takes turns too"),
    windows=measure.WINDOWS,
    seconds=3.0,
    passes_flags=True,
)
def run(session: Session) -> None:
    options, settings = session.options, config.load(session.flags)
    ranks = distributed.init(settings.device)
    noise = measure.warn_of_noise(ranks.device, print)
    workload = Workload(settings, ranks, options.seconds)
    rate, bandwidth = measure.matrix_rate(ranks.device, workload.matrix_dtype()), measure.memory_rate(ranks.device)
    values = measure.take_turns(
        workload.arms(),
        options.windows,
        limit_s=options.limit_s,
        on_error=lambda name, error: print(f"{name}: left out ({type(error).__name__}: {error})"),
    )
    arms = {name: measure.summarize(rates) for name, rates in values.items()}
    flops = workload.flops() / settings.batch_size
    measured = ("step alone", "end to end")
    figures: Record = {"recipe": settings.name, "images": options.images, "noise": noise}
    figures |= {key: getattr(settings, key) for key in ("batch_size", "compile", "batch_norm")}
    figures |= {"method": settings.method.name, "encoder": asdict(settings.encoder), "device": ranks.device.type}
    figures |= {"config": json.loads(config.dump(settings)), "threads": torch.get_num_threads()}
    figures |= {"precision": str(workload.matrix_dtype()).removeprefix("torch."), "views": workload.num_views}
    figures |= {"size_px": workload.batches[0].views[0].shape[-1], "samples_per_s": arms, "flops_per_sample": flops}
    figures |= {"matrix_flops_per_s": rate, "memory_bytes_per_s": bandwidth, "data_wait": workload.data_wait(5)}
    figures |= {"mfu": {name: flops * arms[name]["median"] / rate for name in measured if name in arms}}
    figures |= {"peak_bytes": workload.peak_bytes()}
    with workload.parts.method.eager():
        costs = operators.costs(workload.step, ranks.device)
    figures["operators"] = [asdict(cost) for cost in costs[:NUM_OPERATORS]]
    figures["operators_s"] = sum(cost.seconds for cost in costs)
    workload.close()
    if options.beside:
        other = config.load([*session.flags, *options.beside.split()])
        ratio = gain(settings, other, ranks, 2 * options.windows)
        figures["beside"] = {"flags": options.beside, "samples_per_s_ratio": ratio}
    show(figures)
    if options.picture:
        roofline(figures)(path=options.picture)
    if options.trace:
        trace(workload, options.trace)
    session.record(**figures)
    distributed.shutdown()


def show(figures: Record) -> None:
    """Print the figures."""
    print(f"{figures['recipe']}: {figures['method']}, batch {figures['batch_size']}, {figures['precision']}")
    arms = figures["samples_per_s"]
    for name, rates in arms.items():
        mfu = f"   MFU {100 * figures['mfu'][name]:.0f} %" if name in figures["mfu"] else ""
        views = f"{rates['median'] * figures['views']:,.1f} views/s"
        print(f"  {name:20} {measure.text(rates, 1)} samples/s  {views}{mfu}")
    if {"end to end", "step alone", "loader alone"} <= arms.keys():
        print(f"limit: {limit({name: float(rates['median']) for name, rates in arms.items()})}")
    print(
        f"{figures['flops_per_sample'] / 1e9:.2f} GFLOP per sample; matrix products at "
        f"{figures['matrix_flops_per_s'] / 1e12:.2f} TFLOP/s, memory at "
        f"{figures['memory_bytes_per_s'] / 1e9:.0f} GB/s; a run waits for data {100 * figures['data_wait']:.0f} % of "
        f"the time; peak memory {figures['peak_bytes'] / 2**30:.2f} GiB"
    )
    if beside := figures.get("beside"):
        print(f"with {beside['flags']}: {measure.text(beside['samples_per_s_ratio'], 2)} x end to end")
    print(f"the operators in {1e3 * figures['operators_s']:.0f} ms of a step, uncompiled, each waited for:")
    for cost in figures["operators"]:
        print(
            f"  {cost['name']:36} {100 * cost['seconds'] / figures['operators_s']:4.0f} %  {cost['calls']:5} calls"
            f"  {cost['flops'] / cost['seconds'] / 1e9:9,.1f} GFLOP/s"
            f"  {cost['nbytes'] / cost['seconds'] / 1e9:7.1f} GB/s"
        )


def roofline(figures: Record) -> partial[None]:
    """The picture of the operators that take longest, to be called with its ``path``."""
    points = [
        (cost["name"], cost["seconds"] / figures["operators_s"], cost["flops"] / cost["nbytes"],
         cost["flops"] / cost["seconds"])
        for cost in figures["operators"] if cost["nbytes"] and cost["flops"] and not cost["name"].startswith("sslx")
    ]  # fmt: skip
    title = f"{figures['recipe']}: the operators of a step, uncompiled"
    return partial(charts.roofline, points, figures["matrix_flops_per_s"], figures["memory_bytes_per_s"], title=title)


def trace(workload: Workload, path: Path) -> None:
    """Write torch's profile of three steps."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler:
        for _ in range(3):
            workload.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
