"""Train a recipe to its end with several seeds: time, and accuracy of its encoder before and after.

    python benchmarks/run.py accuracy simclr_cifar10_cpu --source.name folder --source.root DIR
    python benchmarks/run.py accuracy simclr_cifar10 --seeds 0 --source.name folder --source.root DIR

Other options are those of ``sslx pretrain``.  A seed that the results file has, with the same settings and precision,
is left out.  A run that was stopped continues, and its training time is the sum over all starts.  Fails if a seed
trains for longer than --limit-s, or if the mean accuracy of a probe is below --knn-at-least or --linear-at-least.
"""

import json
import signal
import statistics
import time
from functools import partial
from pathlib import Path

import images
import torch
from harness import Record, Session, benchmark, digest, option
from pretraining import TrainingRun, by_name

from sslx import config
from sslx.bench import measure
from sslx.runs import records
from sslx.train.build import precision


@benchmark(
    option("--seeds", nargs="+", type=int, default=[0, 1, 2]),
    option("--limit-s", type=float, default=600.0, help="longest training time of a seed"),
    option("--knn-at-least", type=float, default=0.0, help="lowest mean accuracy of the kNN probe, in [0, 1]"),
    option("--linear-at-least", type=float, default=0.0, help="lowest mean accuracy of the linear probe, in [0, 1]"),
    images.LABEL,
    passes_flags=True,
)
def run(session: Session) -> bool:
    options, settings = session.options, config.load(session.flags)
    device = torch.device("cuda" if torch.cuda.is_available() and settings.device != "cpu" else "cpu")
    parameters, autocast = precision(settings, device)
    key: Record = {"recipe": settings.name, "settings_sha256": settings_digest(settings), "images": options.images}
    key["precision"] = str(autocast or parameters).removeprefix("torch.")
    parts = [
        session.part({**key, "seed": seed}, partial(train, settings, session.flags, seed)) for seed in options.seeds
    ]
    scores = [by_name(record)["pretrained encoder"] for record in parts]
    for record, score in zip(parts, scores, strict=True):
        print(
            f"{record['recipe']}, seed {record['seed']}: kNN {100 * score['knn']:.1f} %, linear "
            f"{100 * score['linear']:.1f} %, trained in {record['train_s']:.0f} s, starts: {record['starts']}"
        )
    measure.require_same_machine(parts)
    longest_s = max(record["train_s"] for record in parts)
    print(f"longest training time {longest_s:.0f} s (limit {options.limit_s:.0f} s)")
    passed = longest_s <= options.limit_s
    for probe, goal in (("knn", options.knn_at_least), ("linear", options.linear_at_least)):
        mean = statistics.mean(score[probe] for score in scores)
        print(f"{probe}: mean {100 * mean:.1f} % (at least {100 * goal:.1f} %)")
        passed = passed and mean >= goal
    return passed


def train(settings: config.PretrainConfig, flags: list[str], seed: int) -> Record:
    """Train one seed, or continue, and probe its encoder."""
    training = TrainingRun(settings.runs / f"accuracy_{settings.name}_{settings_digest(settings)}_{seed}")
    starts = training.folder.with_name(
        f"{training.folder.name}.starts"
    )  # beside the run, whose folder does not exist yet
    starts.parent.mkdir(parents=True, exist_ok=True)
    if finished_at(training.folder) is None:
        with starts.open("a") as file:
            file.write(f"{time.time()}\n")
        # The run gets SIGTERM as well, saves, and exits with 75, which is passed on.
        signal.signal(signal.SIGTERM, lambda *_: None)
        training.pretrain(*flags, "--seed", str(seed), "--resume", "auto")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    probed, metrics = training.probe(), training.metrics()
    started = [float(line) for line in starts.read_text().splitlines()]
    seen = [*(line["time"] for line in metrics), finished_at(training.folder) or 0.0]
    rates = [line["samples_per_s"] for line in metrics if "samples_per_s" in line]
    figures: Record = {"method": settings.method.name, "starts": len(started), "train_s": train_s(started, seen)}
    figures |= {"config": training.config(), "samples": probed["step"] * settings.batch_size}
    return figures | {"samples_per_s": measure.summarize(rates), **probed}


def finished_at(run: Path) -> float | None:
    """Unix time at which a run finished, or None."""
    status = records.read_status(run)
    return status.time if status is not None and status.state == "done" else None


def train_s(started: list[float], seen: list[float]) -> float:
    """Seconds of training, including start-up: from each start to the last time that this start was seen.

    A run is seen when it logs and when it finishes.  Log lines after the checkpoint that the next start continues from
    are removed, so the work that was lost with them does not count.
    """
    ends = [*started[1:], float("inf")]
    times = [[t for t in seen if start <= t < end] for start, end in zip(started, ends, strict=True)]
    return sum(max(each) - start for start, each in zip(started, times, strict=True) if each)


def settings_digest(settings: config.PretrainConfig) -> str:
    """A digest of all settings except those of a single run: folder, name, seed, and whether it resumes."""
    own = ("runs", "name", "seed", "resume")
    return digest({key: value for key, value in json.loads(config.dump(settings)).items() if key not in own})
