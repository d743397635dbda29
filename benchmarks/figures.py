"""The figures of the READMEs, from results/*.jsonl: tables, and single values for sentences.

Each function makes the figures of one topic: "" is its table, other keys are values.  Of several lines that measure the
same, the newest counts.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_methods
from harness import FOLDER, Record
from pretraining import by_name

from sslx import methods as all_methods
from sslx.bench import measure

Figures = dict[str, str]


def newest(
    benchmark: str, *key: str, folder: Path = FOLDER / "results", timed: bool = True, **values: Any
) -> list[Record]:
    """The newest record for each value of ``key`` among those with ``values``; ValueError if there is none.

    timed: raise ValueError if the records are from different machines.  "?ms" in a key stands for whether a record has
    a figure "ms".
    """
    lines = (folder / f"{benchmark}.jsonl").read_text().splitlines()
    matching = [record for record in map(json.loads, lines) if values.items() <= record.items()]
    by_key = {tuple(name[1:] in r if name[0] == "?" else str(r.get(name)) for name in key): r for r in matching}
    if not by_key:
        raise ValueError(f"results/{benchmark}.jsonl has no line with {values}: run the benchmark")
    if timed:
        measure.require_same_machine(by_key.values())
    return list(by_key.values())


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def setting(record: Record) -> Figures:
    """The precision and the machine of a record."""
    precision = record.get("precision") or record["tuned_precision"]
    return {"precision": precision, "machine": f"{record['cores']} cores of {record['cpu']}"}


def percent(values: list[float], deviation: float | None = None) -> str:
    """The mean in percent, ± a deviation; without one, ± half the range of the values."""
    deviation = (max(values) - min(values)) / 2 if deviation is None else deviation
    return f"{100 * statistics.mean(values):.1f}" + (f" ± {100 * deviation:.1f}" if deviation else "")


def probe_table(records: list[Record], first: str) -> str:
    """Accuracies by all probes.

    One record: 1 and 5 labels with the standard deviation over draws of labels.  Several: means ± half the range.
    """
    by_name: dict[str, list[Record]] = {}
    for score in (score for record in records for score in record["scores"]):
        by_name.setdefault(score["name"], []).append(score)
    rows: list[list[str]] = []
    for name, scores in by_name.items():
        cells = [percent([score[probe] for score in scores]) for probe in ("knn", "linear")]
        for labels in scores[0]["low_shot"]:
            shots = [score["low_shot"][labels] for score in scores]
            cells.append(percent([shot["mean"] for shot in shots], shots[0]["std"] if len(shots) == 1 else None))
        rows.append([name, *cells])
    return table([first, "kNN", "linear", "1 label per class", "5 labels per class"], rows)


def accuracy() -> Figures:
    records = newest("accuracy", "seed", recipe="simclr_cifar10_6min")
    times = [record["train_s"] for record in records]
    text = probe_table(records, f"{records[0]['images']}, test accuracy, %")
    text = text.replace("| raw pixels |", "| raw pixels (averaged to 16x16) |")
    return {
        "": text.replace("| pretrained encoder |", "| pretrained encoder (`simclr_cifar10_6min`) |"),
        "seeds": str(len(records)),
        "train_s": f"{min(times):.0f} to {max(times):.0f}",
        **setting(records[0]),
    }


def quickstart() -> Figures:
    return {"": probe_table(newest("quickstart"), "test accuracy, %")}


def methods() -> Figures:
    records = newest("methods", "method", "seed", timed=False)  # accuracy depends on the steps, not on the machine
    measure.require_same_machine(record for record in records if record["seed"] == 0)  # whose speeds are shown
    rows: list[list[str]] = []
    for name in sorted({record["method"] for record in records}):
        seeds = [record for record in records if record["method"] == name]
        trained, untrained = (
            [percent([seed[encoder][probe] for seed in seeds]) for probe in ("knn", "linear")]
            for encoder in ("trained", "untrained")
        )
        first = min(seeds, key=lambda record: record["seed"])
        speed, memory = f"{first['samples_per_s']:,.0f}", f"{first['peak_rss_bytes'] / 2**30:.1f} GiB"
        mark = "" if bench_methods.passes(seeds) else " **fails**"
        rows.append([f"`{name}`{mark}", *trained, ", ".join(untrained), speed, memory])
    head = ["method", "kNN", "linear", "untrained encoder: kNN, linear", "samples/s", "peak memory"]
    return {"": table(head, rows)}


def photos() -> Figures:
    by_key = {
        (record["images"], record["method"]): record for record in newest("photos", "images", "method", timed=False)
    }
    rows: list[list[str]] = []
    for method in all_methods.available():
        small = by_key["2,000 CIFAR-10 images", method]
        crops = by_key["400 crops of scikit-learn's two photos", method]
        before, after = ([f"{100 * score[key]:.1f}" for key in ("knn", "linear")] for score in small["scores"][-2:])
        loss = f"{crops['first_loss']:.2f} to {crops['last_loss']:.2f}"
        rows.append([f"`{method}`", *after, ", ".join(before), loss, f"{crops['feature_rank']:.0f}"])
    head = ["method", "kNN", "linear", "untrained encoder: kNN, linear", "crops: loss, first to last"]
    return {"": table([*head, "directions in use"], rows)}


def time_to_accuracy() -> Figures:
    records = newest("time_to_accuracy", "peer", "budget_s")
    runs = {r["peer"]: r for r in sorted(records, key=lambda r: r["train_s"])}  # the longest run of each
    sufficient = [r for r in records if r["peer"] == "sslx" and r["linear"] >= runs["plain"]["linear"]]
    runs["sslx"] = min(sufficient, key=lambda r: r["train_s"])
    accuracies = {peer: f"{100 * record['linear']:.1f}" for peer, record in runs.items()}
    minutes = {"sslx_min": f"{runs['sslx']['train_s'] / 60:.1f}", "plain_min": f"{runs['plain']['train_s'] / 60:.0f}"}
    return accuracies | minutes


def step() -> Figures:
    record = newest("step", recipe="simclr_cifar10_cpu")[0]
    mfu = {name: f"{100 * share:.0f} %" for name, share in record["mfu"].items()}
    rows = [
        [name, measure.text(rates), f"{rates['median'] * record['views']:,.0f}", mfu.get(name, "")]
        for name, rates in record["samples_per_s"].items()
    ]
    figures = {
        "": table([f"`{record['recipe']}`, batch {record['batch_size']}", "samples/s", "views/s", "MFU"], rows),
        "view_px": str(record["size_px"]),
        "compile": record["compile"],
        **setting(record),
        "data_wait": f"{100 * record['data_wait']:.0f}",
        "gib": f"{record['peak_bytes'] / 2**30:.2f}",
        "tflops": f"{record['matrix_flops_per_s'] / 1e12:.2f}",
    }
    if "beside" in record:
        figures["uncompiled"] = measure.text(record["beside"]["samples_per_s_ratio"], 2)
    return figures


def peers() -> Figures:
    records = newest("peers", "encoder")
    arms = dict.fromkeys(arm for record in records for arm in record["samples_per_s"])

    def cell(record: Record, arm: str) -> str:
        rates = record["samples_per_s"]
        return f"{measure.text(rates[arm])}, {record['peak_bytes'][arm] / 2**30:.2f} GiB" if arm in rates else ""

    rows = [[arm, *(cell(record, arm) for record in records)] for arm in arms]
    for against, label in (("default", "sslx / lightly's example"), ("tuned", "sslx / lightly's best")):
        rows.append([f"**{label}**", *(f"**{measure.text(record['ratio'][against], 2)}**" for record in records)])
    figures = {
        "": table(["samples/s, peak memory", *(record["encoder"] for record in records)], rows),
        **setting(records[0]),
    }
    for record in records:
        peaks = record["peak_bytes"]
        least = min(peak for arm, peak in peaks.items() if arm.startswith("lightly"))
        figures[f"memory_{record['encoder'].replace(' ', '_')}"] = f"{peaks['sslx'] / least:.2f}"
    return figures


def loader() -> Figures:
    records = sorted(newest("loader", "size"), key=lambda record: record["size"])
    fastest: list[dict[str, float]] = []
    for record in records:
        rates: dict[str, float] = {}
        for arm, summary in record["samples_per_s"].items():
            peer = arm.split(" on ")[0].replace("sslx DALI", "sslx, DALI")
            rates[peer] = max(rates.get(peer, 0.0), summary["median"])
        fastest.append(rates)
    rows = [
        [peer, *(f"{rates[peer]:,.0f}" if rates[peer] > 200 else f"{rates[peer]:.1f}" for rates in fastest)]
        for peer in fastest[0]
    ]
    names = list(records[0]["ratio_to_fastest"])
    ratios = [", ".join(f"{record['ratio_to_fastest'][peer]:.1f}" for peer in names) for record in records]
    rows.append([f"**{', '.join(f'sslx / {peer}' for peer in names)}**", *(f"**{ratio}**" for ratio in ratios)])
    return {"": table(["loader", "32 px (CIFAR recipe)", "224 px (ImageNet recipe)"], rows)}


def nt_xent() -> Figures:
    records = newest("nt_xent", "batch_size", "arm", "?ms", device="cpu")
    timed = {(record["arm"], record["batch_size"]): record for record in records if "ms" in record}
    memory = {r["batch_size"]: f"{r['peak_mib']:.0f}" for r in records if r["arm"] == "sslx" and "peak_mib" in r}
    rows = [
        [arm, measure.text(timed[arm, 512]["ms"], 1), measure.text(timed[arm, 4096]["ms"])]
        for arm, size in timed
        if size == 512
    ]
    ms = {arm: record["ms"]["median"] for (arm, size), record in timed.items() if size == 4096}
    return {
        "": table(["", "B = 512", "B = 4096"], rows),
        "times_dense": f"{ms['dense eager'] / ms['sslx']:.1f}",
        "times_lightly": f"{ms['lightly NTXentLoss'] / ms['sslx']:.1f}",
        "share": measure.text(timed["sslx", 4096]["share_of_rate"], scale=100),
        "mib_4096": memory[4096],
        "mib_16384": memory[16384],
    }


def nt_xent_small() -> Figures:
    ms = {(r["arm"], r["batch_size"]): measure.text(r["ms"], 2) for r in newest("nt_xent_small", "batch_size", "arm")}
    sizes = sorted({size for _, size in ms})
    rows = [[str(size), ms["sslx", size], ms["dense eager", size]] for size in sizes]
    return {"": table(["B", "sslx", "dense eager"], rows)}


def parity() -> Figures:
    small, large = (newest("parity", size=size)[0]["mean_difference_of_255"] for size in (32, 224))
    rows = [[name, f"{small[name]:.2f}", f"{large[name]:.2f}"] for name in small]
    return {"": table(["operation", "32 px (CIFAR-10)", "224 px (photos)"], rows)}


def counts() -> Figures:
    names = {
        "simclr_imagenet, local batch norm": "SimCLR, ResNet-50, 224 px, 512",
        "simclr_imagenet": "the same, synchronized batch norm, one of 8 GPUs",
        "simclr_cifar10": "SimCLR, ResNet-18, 32 px, 512",
        "dino_photos, ViT-S/16": "DINO, ViT-S/16, 224 px and small crops, 256",
    }
    scales = {"launches": 1.0, "copies": 1.0, "waits": 1.0, "moved_bytes": 1e9, "peak_bytes": 2.0**30}
    lines = [json.loads(line) for line in (FOLDER / "results" / "counts.jsonl").read_text().splitlines()]
    rows: list[list[str]] = []
    for case, name in names.items():
        history = [line for line in lines if line["case"] == case]
        first, last = (
            [f"{r[figure] / scale:,.0f}" for figure, scale in scales.items()] for r in (history[0], history[-1])
        )
        changes = zip(first, last, strict=True)
        rows.append([name, *(now if now == before else f"{before} → {now}" for before, now in changes)])
    return {"": table(["step", "kernels launched", "copies", "waits", "GB moved", "peak, GiB"], rows)}


def startup() -> Figures:
    one, two = (newest("startup")[0]["seconds"][ranks] for ranks in "12")
    return {"one_s": f"{one['median']:.1f}", "two_s": f"{two['median']:.1f}", "n": str(one["n"])}


def photos_to_onnx() -> Figures:
    by_images = {record["images"]: record for record in newest("photos_to_onnx", "images")}
    minutes = {name: f"{record['total_s'] / 60:.1f}" for name, record in by_images.items()}
    return minutes | {"machine": by_images["photos"]["cpu"]}


def many_files() -> Figures:
    record = newest("many_files", kind="folders")[0]
    many = record["starts"][str(record["files"][1])]
    return {
        "first_s": f"{many['first_cpu_s']:.1f}",
        "second_s": f"{many['second_cpu_s']:.1f}",
        "mb": f"{record['mb_per_million']:.0f}",
    }


def harness() -> Figures:
    record = newest("harness")[0]
    return {
        "agree": f"{record['agree']} of {record['rounds']}",
        "apart": f"{100 * record['medians_apart']['median']:.1f}",
        "spread": f"{100 * record['spread']['median']:.1f}",
    }


def slurm() -> Figures:
    seconds = newest("slurm")[0]["seconds"]
    names = {
        "command_s": "`sslx submit`, until it returns",
        "queued_to_first_step_s": "from queued to the first training step",
        "running_to_first_step_s": "from RUNNING to the first training step",
        "signal_to_end_of_step_s": "from SIGUSR2 to the job's end, saved",
        "requeue_delay_s": "Slurm's own delay before it starts a requeued job",
        "restarted_to_first_step_s": "from RUNNING again to the next training step",
    }
    rows = [[name, measure.text(seconds[key], 1)] for key, name in names.items()]
    return {"": table(["two nodes, one rank each", "s: median of 5 (20th to 80th percentile)"], rows)}


def score(recipe: str) -> str:
    """The scores that a recipe has reached, in the words of its line ``# Score:``."""
    if recipe.endswith("_cpu"):
        records = [r for r in newest("methods", "method", "seed", timed=False) if r["recipe"] == recipe]
        scores, last = [(r["trained"], r["untrained"]) for r in records], f"{records[0]['steps']} steps"
    else:
        records = newest("accuracy", "seed", recipe=recipe)
        scores = [[by_name(r)[f"{name} encoder"] for name in ("pretrained", "untrained")] for r in records]
        last = records[0]["precision"]
    knn, linear, knn_before, linear_before = (
        f"{100 * statistics.mean(pair[i][probe] for pair in scores):.1f}" for i in (0, 1) for probe in ("knn", "linear")
    )
    seeds = f"mean of {len(scores)} seeds" if len(scores) > 1 else "one seed"
    return f"kNN {knn} %, linear {linear} % (untrained: {knn_before}, {linear_before}), {seeds}, {last}."


TOPICS: dict[str, Callable[[], Figures]] = {
    function.__name__: function
    for function in (accuracy, quickstart, methods, photos, time_to_accuracy, step, peers, loader, nt_xent,
                     nt_xent_small, parity, counts, startup, photos_to_onnx, many_files, harness, slurm)
}  # fmt: skip
