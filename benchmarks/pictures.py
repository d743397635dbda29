"""The pictures of the READMEs, from results/*.jsonl: each function returns a call that draws one into its ``path``."""

import statistics
from collections.abc import Callable
from functools import partial

import bench_step
from figures import newest

from sslx.bench import charts

SCALING = {"strong": "the batch shared (strong)", "weak": "a whole batch each (weak)"}


def peers() -> partial[None]:
    record = newest("peers", encoder="resnet18")[0]
    rows = [(arm, s["median"], s["p20"], s["p80"]) for arm, s in record["samples_per_s"].items()]
    subtitle = "SimCLR, ResNet-18, 32 px, 2 CPU cores, samples/s: median, 20th to 80th percentile"
    return partial(charts.bars, rows, title="The same job by sslx and lightly", subtitle=subtitle, highlight="sslx")


def methods() -> partial[None]:
    records = newest("methods", "method", "seed", timed=False)
    linear: dict[str, list[float]] = {}
    for record in records:
        linear.setdefault(record["method"], []).append(100 * record["trained"]["linear"])
    untrained = [100 * record["untrained"]["linear"] for record in records if record["method"] == "simclr"]
    return partial(
        charts.bars,
        sorted((name, statistics.mean(values), min(values), max(values)) for name, values in linear.items()),
        title="Every method after about three minutes on two CPU cores",
        subtitle="CIFAR-10 (JPEG q75), linear probe, %; no ranking: the machine's speed varied; supcon has the labels",
        line=("untrained ResNet", statistics.mean(untrained)),
    )


def roofline() -> partial[None]:
    return bench_step.roofline(newest("step", recipe="simclr_cifar10_cpu")[0])


def time_to_accuracy() -> partial[None]:
    records = sorted(newest("time_to_accuracy", "peer", "budget_s"), key=lambda record: record["train_s"])
    names = {"sslx": "sslx", "lightly": "lightly, tuned, its example's recipe", "plain": "plain script"}
    series = [
        (label, [(r["train_s"] / 60, *(3 * (100 * r["linear"],))) for r in records if r["peer"] == peer])
        for peer, label in names.items()
    ]
    subtitle = "CIFAR-10 (JPEG q75), linear probe; sslx: separate runs, whose schedules end at that time"
    return partial(charts.curves, series, title="Accuracy over time on two CPU cores", subtitle=subtitle,
                   x="minutes since the command was entered", y="test accuracy, %")  # fmt: skip


def scaling() -> partial[None]:
    records = newest("scaling", "kind", "world_size", recipe="simclr_cifar10_cpu")
    series = [
        (label, [(r["world_size"], *(r["batch_size"] / r["step_s"][k] for k in ("median", "p80", "p20")))
                 for r in records if r["kind"] == kind])
        for kind, label in SCALING.items()
    ]  # fmt: skip
    subtitle = f"{records[0]['recipe']}, one thread per rank, gloo, without the loader"
    return partial(charts.curves, series, title="Ranks on one machine", subtitle=subtitle, x="ranks", y="samples/s",
                   powers_of_2=True)  # fmt: skip


PICTURES: dict[str, Callable[[], partial[None]]] = {
    function.__name__: function for function in (peers, methods, roofline, time_to_accuracy, scaling)
}
