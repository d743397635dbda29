"""Every method for the same three minutes on CIFAR-10, on 2 CPU cores: kNN and linear against the untrained encoder.

    python benchmarks/bench_methods.py --root DIR            (DIR/train/CLASS/*, DIR/test/CLASS/*)
    python benchmarks/bench_methods.py --table               what has been measured, as Markdown

Each (method, seed) is a part: its recipe ``<method>_cifar10_cpu`` with as many steps as three minutes hold at the speed
of a short run before; where they took 20 % more or less, the first seed is trained once more, at the speed that it had.
The other seeds take the same number.  Parts that the results file holds, with the recipe as it is now, are left out, so
that a stopped benchmark goes on where it was.  All 26 parts take about two hours.  Fails where a method is not 3 points
better in the linear probe than its untrained encoder (MAE: better by more than the seeds differ).
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from sslx import config, methods
from sslx.bench import measure

RESULTS = Path(__file__).parent / "results" / "methods.jsonl"
SECONDS, MARGIN = 180.0, 0.03
CALIBRATION_STEPS = 60
TOLERANCE = 0.2
EVAL_SIZE = 32  # pixels of the probes' view, the same for all
Record = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="CIFAR-10 as folders of images")
    parser.add_argument("--images", default="CIFAR-10 (JPEG q75)", help="what the images are, for the record")
    parser.add_argument("--methods", nargs="+", default=list(methods.available()), choices=methods.available())
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of training, each")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.table:
        if args.root is None:
            parser.error("--root DIR says where the images are")
        for seed in args.seeds:  # one seed of all methods first
            for name in args.methods:
                part(args, name, seed)
    found = [record for record in recorded(args.results) if record["method"] in args.methods]
    print(table(found))
    return 0 if all(passes(name, of(found, name)) for name in {record["method"] for record in found}) else 1


def part(args: argparse.Namespace, name: str, seed: int) -> None:
    """Measure one method with one seed, unless that is done, and add it to the results."""
    recipe = config.recipes()[f"{name}_cifar10_cpu"]
    key = {"method": name, "recipe_sha256": digest(recipe), "seconds": args.seconds, "images": args.images}
    done = {r["seed"]: r["steps"] for r in recorded(args.results) if r.items() >= key.items()}
    if seed in done:
        return
    key["seed"] = seed
    before = measure.stamp()["load_1min"]
    steps = next(iter(done.values()), 0)
    speed, peak = pretrain(args, recipe.stem, seed, steps or CALIBRATION_STEPS)
    batch_size, encoder = run_config(args)["batch_size"], run_config(args)["encoder"]
    for _ in range(0 if done else 2):
        if abs(steps * batch_size / speed - args.seconds) > TOLERANCE * args.seconds:
            steps = max(CALIBRATION_STEPS, round(args.seconds * speed / batch_size))
            speed, peak = pretrain(args, recipe.stem, seed, steps)
    untrained = next(
        (
            r["untrained"]
            for r in recorded(args.results)
            if (r["seed"], r["encoder"], r["images"]) == (seed, encoder, args.images)
        ),
        None,
    )
    scores = probe(args, baselines=untrained is None)
    record = {"benchmark": "methods", **key, "recipe": recipe.stem, "encoder": encoder, "steps": steps}
    record |= {"view_px": EVAL_SIZE}
    record |= {"train_s": steps * batch_size / speed, "samples_per_s": speed, "peak_rss_bytes": peak}
    record |= {"trained": scores["pretrained encoder"], "untrained": untrained or scores["untrained encoder"]}
    measure.append(args.results, {**record, "load_before": before})


def digest(recipe: Path) -> str:
    """Of a recipe without its comments; all run uncompiled."""
    wanted = {key: value for key, value in tomllib.loads(recipe.read_text()).items() if key != "compile"}
    return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]


def pretrain(
    args: argparse.Namespace, recipe: str, seed: int, steps: int, compile: str = "off", cache: str = ""
) -> tuple[float, int]:
    """(samples/s of all but the first log line, peak resident bytes) of a run in a process of its own.

    cache: a folder for what is compiled, instead of the user's.
    """
    shutil.rmtree(args.runs / "bench_methods", ignore_errors=True)
    command = [sys.executable, "-m", "sslx", "pretrain", recipe, "--steps", str(steps), "--seed", str(seed)]
    command += ["--source.name", "folder", "--source.root", str(args.root), "--data.eval-size", str(EVAL_SIZE)]
    command += ["--compile", compile, "--log.every", "10", "--runs", str(args.runs), "--name", "bench_methods"]
    process = subprocess.Popen(command, env=os.environ | ({"TORCHINDUCTOR_CACHE_DIR": cache} if cache else {}))
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{recipe}: sslx pretrain ended with {process.returncode}")
    lines = [json.loads(line) for line in (args.runs / "bench_methods" / "metrics.jsonl").read_text().splitlines()]
    timed = [line for line in lines if "samples_per_s" in line]
    first, last = timed[0], timed[-1]
    batch_size = run_config(args)["batch_size"]
    return (last["step"] - first["step"]) * batch_size / (last["time"] - first["time"]), usage.ru_maxrss * 1024


def run_config(args: argparse.Namespace) -> Record:
    return json.loads((args.runs / "bench_methods" / "config.json").read_text())


def probe(args: argparse.Namespace, *, baselines: bool) -> dict[str, Record]:
    """The kNN and linear accuracies by representation."""
    run = args.runs / "bench_methods"
    flags = ["--baselines" if baselines else "--no-baselines", "--probe.shots"]
    subprocess.run([sys.executable, "-m", "sslx", "probe", str(run), *flags], check=True)
    scores = json.loads((run / "probe.json").read_text())["scores"]
    return {score["name"]: {"knn": score["knn"], "linear": score["linear"]} for score in scores}


def recorded(path: Path) -> list[Record]:
    """The results so far; of a part that was measured twice, the later."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = {(r["method"], r["seed"]): r for r in map(json.loads, lines) if r["benchmark"] == "methods"}
    return list(found.values())


def of(found: list[Record], name: str) -> list[Record]:
    return [record for record in found if record["method"] == name]


def passes(name: str, found: list[Record]) -> bool:
    """Whether every seed is better than its untrained encoder by the margin."""
    gains = [r["trained"]["linear"] - r["untrained"]["linear"] for r in found]
    linear = [r["trained"]["linear"] for r in found]
    margin = max(linear) - min(linear) if name == "mae" else MARGIN
    return min(gains) > margin if name == "mae" else min(gains) >= margin


def table(found: list[Record]) -> str:
    """A Markdown table, a row for each method, by name, since it is no ranking.  Means over seeds, ± half
    of how far they differ.

    Speed and memory are the first seed's: the others take as many steps, on whatever machine.
    """
    rows = ["| method | kNN | linear | untrained encoder: kNN, linear | samples/s | peak memory |", "| --- " * 6 + "|"]

    def percent(values: list[float]) -> str:
        text = f"{100 * statistics.mean(values):.1f}"
        return f"{text} ± {50 * (max(values) - min(values)):.1f}" if len(values) > 1 else text

    for name in sorted({r["method"] for r in found}):
        mine = of(found, name)
        cells = [percent([r["trained"][score] for r in mine]) for score in ("knn", "linear")]
        cells.append(", ".join(percent([r["untrained"][score] for r in mine]) for score in ("knn", "linear")))
        first = min(mine, key=lambda record: record["seed"])
        cells += [f"{first['samples_per_s']:,.0f}", f"{first['peak_rss_bytes'] / 2**30:.1f} GiB"]
        rows.append(f"| `{name}` | " + " | ".join(cells) + " |" + ("" if passes(name, mine) else " **fails**"))
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
