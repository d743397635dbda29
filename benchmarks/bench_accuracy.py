"""A recipe to its end, with several seeds: its time, and kNN and linear accuracy against the untrained encoder.

    python benchmarks/bench_accuracy.py simclr_cifar10_cpu --data.source folder --data.root DIR
    python benchmarks/bench_accuracy.py simclr_cifar10 --seeds 0 --data.source folder --data.root DIR

Flags that are not this script's are those of ``sslx pretrain``.  Each seed is a part: one that the results file has,
with the same settings and precision, is left out, and a run that was stopped goes on: its time is the sum of its
starts'.  Fails where a part trains for longer than --limit-s, or where the mean of a probe's accuracies stays under its
--at-least.
"""

import argparse
import hashlib
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sslx import config
from sslx.bench import measure
from sslx.runs import records
from sslx.train.build import precision

RESULTS = Path(__file__).parent / "results" / "accuracy.jsonl"
Record = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", default="CIFAR-10 (JPEG q75)", help="what the images are, for the record")
    parser.add_argument("--limit-s", type=float, default=600.0, help="of training, each")
    parser.add_argument("--knn-at-least", type=float, default=0.0, help="the kNN probe's accuracy, of 1")
    parser.add_argument("--linear-at-least", type=float, default=0.0, help="the linear probe's accuracy, of 1")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args, flags = parser.parse_known_args()
    parts = [part(args, flags, seed) for seed in args.seeds]
    for record in parts:
        knn, linear = (100 * pretrained(record)[key] for key in ("knn", "linear"))
        print(f"{record['recipe']}, seed {record['seed']}: kNN {knn:.1f} %, linear {linear:.1f} %,", end=" ")
        print(f"trained in {record['train_s']:.0f} s, {record['starts']} start{'s' * (record['starts'] > 1)}")
    measure.comparable(parts)
    slowest = max(record["train_s"] for record in parts)
    print(f"{slowest:.0f} s at most (limit {args.limit_s:.0f})")
    passed = slowest <= args.limit_s
    for probe, goal in (("knn", args.knn_at_least), ("linear", args.linear_at_least)):
        mean = statistics.mean(pretrained(record)[probe] for record in parts)
        print(f"{probe}: mean {100 * mean:.1f} % (at least {100 * goal:.1f})")
        passed &= mean >= goal
    return 0 if passed else 1


def pretrained(record: Record) -> dict[str, float]:
    """The trained encoder's scores."""
    return next(score for score in record["scores"] if score["name"] == "pretrained encoder")


def part(args: argparse.Namespace, flags: list[str], seed: int) -> Record:
    """What the results file has of this seed, or else a run of it, added there."""
    settings = config.load(flags)
    settings_sha256 = digest(settings)
    run = settings.runs / f"accuracy_{settings.name}_{settings_sha256}_{seed}"
    flags = [*flags, "--seed", str(seed), "--name", run.name, "--resume", "auto"]
    key: Record = {"recipe": settings.name, "settings_sha256": settings_sha256, "images": args.images, "seed": seed}
    gpu = torch.cuda.is_available() and settings.device != "cpu"
    parameters, autocast = precision(settings, torch.device("cuda" if gpu else "cpu"))
    key["precision"] = str(autocast or parameters).removeprefix("torch.")
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    done = [record for record in map(json.loads, lines) if record.items() >= key.items()]
    if done:
        return done[-1]
    sslx, before = [sys.executable, "-m", "sslx"], measure.stamp()["load_1min"]
    starts = run.with_name(f"{run.name}.starts")  # beside it: a run's folder is not there before its first start
    starts.parent.mkdir(parents=True, exist_ok=True)
    if finished_s(run) is None:
        with starts.open("a") as file:
            file.write(f"{time.time()}\n")
        signal.signal(
            signal.SIGTERM, lambda *_: None
        )  # the run gets it too, saves, and ends with 75: to be gone on with
        if code := subprocess.run([*sslx, "pretrain", *flags], check=False).returncode:
            sys.exit(code)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    subprocess.run([*sslx, "probe", str(run)], check=True)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    begun = [float(line) for line in starts.read_text().splitlines()]
    seen = [*(line["time"] for line in metrics), finished_s(run) or 0.0]
    rates = [line["samples_per_s"] for line in metrics if "samples_per_s" in line]
    found = json.loads((run / "probe.json").read_text())
    record = {"benchmark": "accuracy", **key, "method": settings.method.name, "starts": len(begun)}
    record |= {"train_s": train_s(begun, seen), "config": json.loads((run / "config.json").read_text())}
    record |= {"samples": found["step"] * settings.batch_size, "samples_per_s": measure.summarize(rates)}
    record |= {"load_before": before, **found}
    measure.append(args.results, record)
    return record


def finished_s(run: Path) -> float | None:
    """When a run came to its end (Unix, s)."""
    status = records.read_status(run)
    return status.time if status is not None and status.state == "done" else None


def train_s(begun: list[float], seen: list[float]) -> float:
    """Seconds of training, start-up included: from each start to when it was last seen (a line of its log, or its end).

    What a stopped start did after the checkpoint that the next one went on from is no line of the log any more.
    """
    ends = [*begun[1:], float("inf")]
    of_each = [[when for when in seen if start <= when < end] for start, end in zip(begun, ends, strict=True)]
    return sum(max(times) - start for start, times in zip(begun, of_each, strict=True) if times)


def digest(settings: config.PretrainConfig) -> str:
    """Of all settings but a run's own: where it is, its name, its seed, and whether it resumes."""
    own = ("runs", "name", "seed", "resume")
    shared = {key: value for key, value in json.loads(config.dump(settings)).items() if key not in own}
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
