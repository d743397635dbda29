"""Results -> the figures of the READMEs: the text between their marks is written from ``results/*.jsonl``.

    python benchmarks/report.py            (writes them)
    python benchmarks/report.py --check    (fails where a README says something else: run by the tests)

A mark is ``<!-- figures: NAME -->``, with ``<!-- end of figures -->`` after what NAME's function below returns.
A recipe's line ``# Score: `` is written too.  A picture ``results/NAME.svg`` that a README shows is drawn by NAME's
function in ``PICTURES``.  Of lines that measure the same the newest counts; nothing holds figures of two machines.
"""

import argparse
import hashlib
import json
import re
import statistics
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bench_counts
import bench_methods
import bench_photos
import bench_step

from sslx.bench import charts, measure

HERE = Path(__file__).parent
READMES = [
    HERE.parent / folder / "README.md"
    for folder in (".", "benchmarks", "slurm", "kernels", "sslx/data", "sslx/methods", "sslx/train", "tests")
]
RECIPES = sorted(HERE.parent.glob("sslx/recipes/*_cifar10_*.toml"))
SCORE = re.compile(r"^# Score: .*\n", re.MULTILINE)
BLOCK = re.compile(r"(?<=<!-- figures: )(\w+)( -->\n)(.*?)(?=<!-- end of figures -->)", re.DOTALL)
PICTURE = re.compile(r"\bresults/(\w+)\.svg")
SCALING = {"strong": "the batch shared (strong)", "weak": "a whole batch each (weak)"}
Record = dict[str, Any]


def newest(
    benchmark: str, *key: str, folder: Path = HERE / "results", timed: bool = True, **wanted: Any
) -> list[Record]:
    """The last record of each value of ``key``, in their order.  ``timed``: of one machine, else ValueError.

    Of a figure, as "?ms", it counts whether a record has it.
    """
    lines = (folder / f"{benchmark}.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if wanted.items() <= record.items()]
    found = {tuple(name[1:] in r if name[0] == "?" else str(r.get(name)) for name in key): r for r in records}
    if not found:
        raise ValueError(f"no line of results/{benchmark}.jsonl has {wanted}: run its benchmark")
    if timed:
        measure.comparable(found.values())
    return list(found.values())


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def prose(text: str) -> str:
    """A paragraph, as wide as the rest of the file."""
    return "\n" + textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n"


def spread(found: dict[str, float], digits: int = 0) -> str:
    """Median, and the 20th and 80th percentiles."""
    return f"{found['median']:,.{digits}f} ({found['p20']:,.{digits}f} to {found['p80']:,.{digits}f})"


def probes(found: list[Record], first: str, names: dict[str, str]) -> str:
    """Accuracies by all probes: of one run, 1 and 5 labels ± the standard deviation of their draws, or of several,
    means ± half the runs' range."""
    by_name: dict[str, list[Record]] = {}
    for score in (score for record in found for score in record["scores"]):
        by_name.setdefault(score["name"], []).append(score)

    def cell(values: list[float], apart: float | None = None) -> str:
        apart = (max(values) - min(values)) / 2 if apart is None else apart
        return f"{100 * statistics.mean(values):.1f}" + (f" ± {100 * apart:.1f}" if apart else "")

    def shot(few: list[Record]) -> str:
        return cell([each["mean"] for each in few], few[0]["std"] if len(few) == 1 else None)

    def row(name: str, scores: list[Record]) -> list[str]:
        shots = [shot([score["low_shot"][labels] for score in scores]) for labels in scores[0]["low_shot"]]
        return [names.get(name, name), *(cell([score[k] for score in scores]) for k in ("knn", "linear")), *shots]

    head = [first, "kNN", "linear", "1 label per class", "5 labels per class"]
    return table(head, [row(*item) for item in by_name.items()])


def quickstart() -> str:
    return probes(newest("quickstart"), "test accuracy, %", {})


def startup() -> str:
    one, two = (newest("startup")[0]["seconds"][ranks] for ranks in "12")
    return prose(
        f"From the command to the first training step, one process takes {one['median']:.1f} s and two processes take "
        f"{two['median']:.1f} s (medians of {one['n']})."
    )


def parity() -> str:
    small, large = (newest("parity", size=size)[0]["mean_difference_of_255"] for size in (32, 224))
    rows = [[name, f"{small[name]:.2f}", f"{large[name]:.2f}"] for name in small]
    return table(["operation", "32 px (CIFAR-10)", "224 px (photos)"], rows)


def loader() -> str:
    found = sorted(newest("loader", "size"), key=lambda record: record["size"])
    best = [_fastest(record["samples_per_s"]) for record in found]
    rows = [[peer, *(f"{b[peer]:,.0f}" if b[peer] > 200 else f"{b[peer]:.1f}" for b in best)] for peer in best[0]]
    peers = list(found[0]["ratio_to_fastest"])
    ratios = [", ".join(f"{record['ratio_to_fastest'][peer]:.1f}" for peer in peers) for record in found]
    rows.append([f"**{', '.join(f'sslx / {peer}' for peer in peers)}**", *(f"**{ratio}**" for ratio in ratios)])
    return table(["loader", "32 px (CIFAR recipe)", "224 px (ImageNet recipe)"], rows)


def _fastest(arms: dict[str, dict[str, float]]) -> dict[str, float]:
    """Peer -> samples/s of its faster setting."""
    found: dict[str, float] = {}
    for arm, figures in arms.items():
        peer = arm.split(" on ")[0].replace("sslx DALI", "sslx, DALI")
        found[peer] = max(found.get(peer, 0.0), figures["median"])
    return found


def nt_xent() -> str:
    timed = [r for r in newest("nt_xent", "batch_size", "arm", "?ms", device="cpu") if "ms" in r]
    sizes = (512, 4096)
    by = {(r["arm"], r["batch_size"]): r for r in timed}
    arms = [arm for arm, size in by if size == sizes[0]]
    rows = [[arm, spread(by[arm, 512]["ms"], 1), spread(by[arm, 4096]["ms"])] for arm in arms]
    ours, dense, lightly = (by[arm, 4096] for arm in ("sslx", "dense eager", "lightly NTXentLoss"))
    share = {key: 100 * value for key, value in ours["share_of_rate"].items()}
    peaks = {}
    for record in newest("nt_xent", "batch_size", "arm", "?ms", device="cpu", arm="sslx"):
        if "peak_mib" in record:
            peaks[record["batch_size"]] = record["peak_mib"]
    return table(["", *(f"B = {size}" for size in sizes)], rows) + prose(
        f"At B = 4096, sslx is {dense['ms']['median'] / ours['ms']['median']:.1f} times as fast as the dense matrix "
        f"and {lightly['ms']['median'] / ours['ms']['median']:.1f} times as fast as lightly's loss. It reaches "
        f"{spread(share)} % of the rate at which this machine multiplies matrices (counted at 5·N²·D) and takes "
        f"{peaks[4096]:.0f} MiB of memory; B = 16384 takes {peaks[16384]:.0f} MiB. How: "
        "[kernels/README.md](../kernels/README.md)."
    )


def nt_xent_small() -> str:
    by = {(r["arm"], r["batch_size"]): spread(r["ms"], 2) for r in newest("nt_xent_small", "batch_size", "arm")}
    sizes = sorted({size for _, size in by})
    return table(["B", "sslx", "dense eager"], [[str(n), by["sslx", n], by["dense eager", n]] for n in sizes])


def methods() -> str:
    found = newest("methods", "method", "seed", timed=False)  # as many steps on any machine
    measure.comparable(record for record in found if record["seed"] == 0)  # whose speeds are shown
    return bench_methods.table(found) + "\n"


def slurm() -> str:
    found = newest("slurm")[0]["seconds"]
    rows = [
        ["`sslx submit`, until it returns", spread(found["command_s"], 1)],
        ["from queued to the first training step", spread(found["queued_to_first_step_s"], 1)],
        ["from RUNNING to the first training step", spread(found["running_to_first_step_s"], 1)],
        ["from SIGUSR2 to the job's end, saved", spread(found["signal_to_end_of_step_s"], 1)],
        ["Slurm's own delay before it starts a requeued job", spread(found["requeue_delay_s"], 1)],
        ["from RUNNING again to the next training step", spread(found["restarted_to_first_step_s"], 1)],
    ]
    return table(["two nodes, one rank each", "s: median of 5 (20th to 80th percentile)"], rows)


def accuracy() -> str:
    found = newest("accuracy", "seed", recipe="simclr_cifar10_6min")
    names = {
        "raw pixels": "raw pixels (averaged to 16x16)",
        "pretrained encoder": "pretrained encoder (`simclr_cifar10_6min`)",
    }
    times = [record["train_s"] for record in found]
    return probes(found, f"{found[0]['images']}, test accuracy, %", names) + prose(
        f"Means of {len(found)} seeds, ± half their range. Each was trained in {min(times):.0f} to {max(times):.0f} s, "
        f"in {found[0]['precision']}, on {found[0]['cores']} cores of {found[0]['cpu']}."
    )


def step() -> str:
    record = newest("step", recipe="simclr_cifar10_cpu")[0]
    beside = record.get("beside")
    rows = [
        [name, spread(found), f"{found['median'] * record['views']:,.0f}",
         f"{100 * record['mfu'][name]:.0f} %" if name in record["mfu"] else ""]
        for name, found in record["samples_per_s"].items()
    ]  # fmt: skip
    return table([f"`{record['recipe']}`, batch {record['batch_size']}", "samples/s", "views/s", "MFU"], rows) + prose(
        f"{record['views']} views of {record['size_px']} px, {record['precision']}"
        f"{', compiled' if record['compile'] == 'on' else ''}, on {record['cores']} cores of {record['cpu']}. "
        f"A run waits for data {100 * record['data_wait']:.0f} % of the time and takes "
        f"{record['peak_bytes'] / 2**30:.2f} GiB at its peak. MFU (model FLOP utilization) is what the "
        "step's products and convolutions use of the "
        f"{record['matrix_flops_per_s'] / 1e12:.2f} TFLOP/s that this machine reaches in large {record['precision']} "
        "products."
        + (
            f" Uncompiled, the same run makes {spread(beside['samples_per_s_ratio'], 2)} times as many samples/s."
            if beside
            else ""
        )
    )


def peers() -> str:
    found = newest("peers", "encoder")
    head = ["samples/s, peak memory", *(record["encoder"] for record in found)]

    def cell(record: Record, arm: str) -> str:
        rates = record["samples_per_s"]
        return f"{spread(rates[arm])}, {record['peak_bytes'][arm] / 2**30:.2f} GiB" if arm in rates else ""

    arms = dict.fromkeys(arm for record in found for arm in record["samples_per_s"])
    rows = [[arm, *(cell(record, arm) for record in found)] for arm in arms]
    for against, label in (("default", "sslx / lightly's example"), ("tuned", "sslx / lightly's best")):
        rows.append([f"**{label}**", *(f"**{spread(r['ratio'][against], 2)}**" for r in found)])
    lightly = [min(peak for arm, peak in r["peak_bytes"].items() if arm.startswith("lightly")) for r in found]
    shares = ", ".join(
        f"{r['peak_bytes']['sslx'] / least:.2f} of it ({r['encoder']})" for r, least in zip(found, lightly, strict=True)
    )
    return table(head, rows) + prose(
        f"On {found[0]['cores']} cores of {found[0]['cpu']}, {found[0]['tuned_precision']}. The last two rows are "
        "medians of ratios, not ratios of the medians above: in each turn, sslx is compared with that turn's run of "
        "lightly's example and with the faster of that turn's two tuned runs, since the machine's speed moves from "
        "turn to turn. "
        f"Compared with the lightly run that takes the least memory, sslx takes {shares}."
    )


def harness() -> str:
    record = newest("harness")[0]
    return prose(
        f"When the same work was measured twice in one run, the two medians differed by less than the printed spread "
        f"in {record['agree']} of {record['rounds']} rounds ({100 * record['medians_apart']['median']:.1f} % apart, "
        f"spread {100 * record['spread']['median']:.1f} %; medians)."
    )


def time_to_accuracy() -> str:
    found = newest("time_to_accuracy", "peer", "budget_s")
    plain, lightly = (
        max((r for r in found if r["peer"] == peer), key=lambda r: r["train_s"]) for peer in ("plain", "lightly")
    )
    ours = [r for r in found if r["peer"] == "sslx" and r["linear"] >= plain["linear"]]
    first = min(ours, key=lambda r: r["train_s"])
    return prose(
        f"With a recipe that was tuned for this test, sslx reaches {100 * first['linear']:.1f} % (linear probe) after "
        f"{first['train_s'] / 60:.1f} minutes. The plain script reaches {100 * plain['linear']:.1f} % after "
        f"{plain['train_s'] / 60:.0f} minutes, and lightly {100 * lightly['linear']:.1f} %."
    )


def peers_picture() -> partial[None]:
    record = newest("peers", encoder="resnet18")[0]
    rows = [(arm, s["median"], s["p20"], s["p80"]) for arm, s in record["samples_per_s"].items()]
    subtitle = "SimCLR, ResNet-18, 32 px, 2 CPU cores, samples/s: median, 20th to 80th percentile"
    return partial(charts.bars, rows, title="The same job by sslx and lightly", subtitle=subtitle, ours="sslx")


def methods_picture() -> partial[None]:
    found = newest("methods", "method", "seed", timed=False)
    by_name = {record["method"]: [100 * r["trained"]["linear"] for r in bench_methods.of(found, record["method"])]
               for record in found}  # fmt: skip
    rows = [(name, statistics.mean(v), min(v), max(v)) for name, v in by_name.items()]
    untrained = statistics.mean(100 * r["untrained"]["linear"] for r in bench_methods.of(found, "simclr"))
    return partial(
        charts.bars,
        sorted(rows),
        title="Every method after about three minutes on two CPU cores",
        subtitle="CIFAR-10 (JPEG q75), linear probe, %; no ranking: the machine's speed varied; supcon has the labels",
        line=("untrained ResNet", untrained),
    )


def roofline_picture() -> partial[None]:
    return bench_step.roofline(newest("step", recipe="simclr_cifar10_cpu")[0])


def time_to_accuracy_picture() -> partial[None]:
    found = sorted(newest("time_to_accuracy", "peer", "budget_s"), key=lambda record: record["train_s"])
    names = {"sslx": "sslx", "lightly": "lightly, tuned, its example's recipe", "plain": "plain script"}
    series = [
        (label, [(r["train_s"] / 60, *(3 * (100 * r["linear"],))) for r in found if r["peer"] == peer])
        for peer, label in names.items()
    ]
    subtitle = "CIFAR-10 (JPEG q75), linear probe; sslx: runs of their own, whose schedules end there"
    return partial(charts.curves, series, title="Accuracy over time on two CPU cores", subtitle=subtitle,
                   x="minutes from the command on", y="test accuracy, %")  # fmt: skip


def scaling_picture() -> partial[None]:
    found = newest("scaling", "kind", "world_size", recipe="simclr_cifar10_cpu")
    series = [
        (SCALING[kind], [(r["world_size"], *(r["batch_size"] / r["step_s"][k] for k in ("median", "p80", "p20")))
                            for r in found if r["kind"] == kind])
        for kind in SCALING
    ]  # fmt: skip
    subtitle = f"{found[0]['recipe']}, one thread a rank, gloo, without the loader"
    return partial(charts.curves, series, title="Ranks on one machine", subtitle=subtitle, x="ranks", y="samples/s",
                   powers_of_2=True)  # fmt: skip


FIGURES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (quickstart, accuracy, startup, parity, loader, nt_xent, nt_xent_small, methods, slurm, step, peers,
                     harness, time_to_accuracy)
} | {"counts": bench_counts.markdown, "photos": bench_photos.markdown}  # fmt: skip
PICTURES: dict[str, Callable[[], partial[None]]] = {
    "peers": peers_picture,
    "methods": methods_picture,
    "time_to_accuracy": time_to_accuracy_picture,
    "scaling": scaling_picture,
    "roofline": roofline_picture,
}


def written(path: Path, text: str) -> str:
    """A README's text, or a recipe's, with its figures as the results have them."""
    if path.suffix == ".toml":
        return SCORE.sub(lambda _: score(path.stem), text)
    return BLOCK.sub(lambda found: found[1] + found[2] + FIGURES[found[1]](), text)


def score(recipe: str) -> str:
    """What a recipe reached on CIFAR-10 (JPEG q75) on 2 CPU cores, in three minutes or six, as a line of its header."""
    if not recipe.endswith("_cpu"):
        runs = newest("accuracy", "seed", recipe=recipe)
        rows = [{row["name"]: row for row in record["scores"]} for record in runs]
        means = [100 * statistics.mean(row[name][probe] for row in rows)
                 for name in ("pretrained encoder", "untrained encoder") for probe in ("knn", "linear")]  # fmt: skip
        return "# Score: kNN {:.1f} %, linear {:.1f} % (untrained: {:.1f}, {:.1f}), ".format(*means) + (
            f"mean of {len(runs)} seeds, {runs[0]['precision']}.\n"
        )
    found = [record for record in newest("methods", "method", "seed", timed=False) if record["recipe"] == recipe]
    means = [100 * statistics.mean(record[encoder][probe] for record in found)
             for encoder in ("trained", "untrained") for probe in ("knn", "linear")]  # fmt: skip
    return "# Score: kNN {:.1f} %, linear {:.1f} % (untrained: {:.1f}, {:.1f}), ".format(*means) + (
        f"{'mean of 2 seeds' if len(found) == 2 else 'one seed'}, {found[0]['steps']} steps.\n"
    )


def stale(name: str, folder: Path = HERE / "results", *, check: bool) -> bool:
    """Whether a picture was not of the results as they are; draws it then, unless it is only checked."""
    drawing, path = PICTURES[name](), folder / f"{name}.svg"
    shown = repr((drawing.func.__name__, drawing.args, drawing.keywords)).encode()
    mark = f"<!-- of {hashlib.sha256(shown).hexdigest()[:16]} -->\n"
    if path.exists() and path.read_text().endswith(mark):
        return False
    if not check:
        drawing(path=path)
        path.write_text(path.read_text() + mark)
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where something differs")
    args = parser.parse_args(argv)
    texts = {path: path.read_text() for path in [*READMES, *RECIPES]}
    changed = [path for path, text in texts.items() if written(path, text) != text]
    shown = sorted({name for text in texts.values() for name in PICTURE.findall(text)})
    drawn = [HERE / "results" / f"{name}.svg" for name in shown if stale(name, check=args.check)]
    for path in changed:
        if not args.check:
            path.write_text(written(path, texts[path]))
    for path in [*changed, *drawn]:
        print(
            f"{path} does not show what results/ do: run python benchmarks/report.py"
            if args.check
            else f"{path} written"
        )
    return 1 if args.check and (changed or drawn) else 0


if __name__ == "__main__":
    sys.exit(main())
