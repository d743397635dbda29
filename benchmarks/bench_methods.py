"""Train every method for three minutes on CIFAR-10 on two CPU cores, and probe its encoder before and after.

    python benchmarks/run.py methods --root DIR            (about two hours for 13 methods and two seeds)

The first seed of a method trains for as many steps as --seconds allow at the speed of a short run before it.  If that
took 20 % more or less than planned, it trains once more with a better number.  The other seeds take the same number of
steps.  A seed that the results file has, with the recipe as it is now, is left out, so a stopped benchmark continues.
Fails if the linear probe of a method is not at least 3 points better than that of its untrained encoder (for MAE:
better by more than its seeds differ).
"""

import shutil
import tomllib
from pathlib import Path

import images
from harness import Record, Session, benchmark, digest, option
from pretraining import TrainingRun, by_name

from sslx import config, methods

MIN_GAIN = 0.03
CALIBRATION_STEPS = 60
TOLERANCE = 0.2
EVAL_SIZE = 32  # pixels of the view that is probed, the same for all


@benchmark(
    images.CIFAR10,
    images.LABEL,
    option("--methods", nargs="+", default=list(methods.available()), choices=methods.available()),
    option("--seeds", nargs="+", type=int, default=[0, 1]),
    option("--seconds", type=float, default=180.0, help="training time of each run"),
    option("--runs", type=Path, default=Path("runs"), help="folder of the run"),
)
def run(session: Session) -> bool:
    options = session.options
    for seed in options.seeds:  # one seed of all methods first
        for name in options.methods:
            part(session, name, seed)
    passed = True
    for name in options.methods:
        newest = list({record["seed"]: record for record in session.recorded(method=name)}.values())
        for record in newest:
            probes = (f"{probe} {100 * record['trained'][probe]:.1f} % " for probe in ("knn", "linear"))
            print(f"{name}, seed {record['seed']}:", *probes, "" if passes(newest) else "FAILS")
        passed = passed and passes(newest)
    return passed


def part(session: Session, name: str, seed: int) -> None:
    """Measure one seed of a method, unless that is done."""
    options, recipe = session.options, config.recipes()[f"{name}_cifar10_cpu"]
    key: Record = {"method": name, "recipe_sha256": recipe_digest(recipe)}
    key |= {"seconds": options.seconds, "images": options.images}
    steps_of_seed = {record["seed"]: record["steps"] for record in session.recorded(**key)}
    if seed in steps_of_seed:
        return
    training = TrainingRun(options.runs / "bench_methods")
    steps = next(iter(steps_of_seed.values()), 0)
    peak = pretrain(training, options.root, recipe.stem, steps or CALIBRATION_STEPS, seed)
    batch_size, encoder = training.config()["batch_size"], training.config()["encoder"]
    for _ in range(0 if steps else 2):
        speed = training.samples_per_s()
        if abs(steps * batch_size / speed - options.seconds) > TOLERANCE * options.seconds:
            steps = max(CALIBRATION_STEPS, round(options.seconds * speed / batch_size))
            peak = pretrain(training, options.root, recipe.stem, steps, seed)
    untrained = next(iter(session.recorded(seed=seed, encoder=encoder, images=options.images)), {}).get("untrained")
    baselines = "--no-baselines" if untrained else "--baselines"
    scores = by_name(training.probe(baselines, "--probe.shots", "--probe.fractions"))
    speed = training.samples_per_s()
    session.record(**key, seed=seed, recipe=recipe.stem, encoder=encoder, steps=steps, samples_per_s=speed,
                   view_px=EVAL_SIZE, train_s=steps * batch_size / speed, peak_rss_bytes=peak,
                   trained=scores["pretrained encoder"],
                   untrained=untrained or scores["untrained encoder"])  # fmt: skip


def recipe_digest(recipe: Path) -> str:
    """A digest of a recipe without its comments and without ``compile``, which each benchmark sets."""
    return digest({key: value for key, value in tomllib.loads(recipe.read_text()).items() if key != "compile"})


def pretrain(
    training: TrainingRun, root: Path, recipe: str, steps: int, seed: int, compile: str = "off", **environ: str
) -> int:
    """Train a recipe anew on the images in ``root``; return the peak of resident memory in bytes."""
    shutil.rmtree(training.folder, ignore_errors=True)
    flags = [
        *images.flags("folder", root),
        "--data.eval-size",
        str(EVAL_SIZE),
        "--compile",
        compile,
        "--log.every",
        "10",
    ]
    return training.pretrain(recipe, "--steps", str(steps), "--seed", str(seed), *flags, **environ)


def passes(seeds: list[Record]) -> bool:
    """Whether training has improved the linear probe enough, given the lines of a method, one for each seed."""
    gains = [record["trained"]["linear"] - record["untrained"]["linear"] for record in seeds]
    if seeds[0]["method"] != "mae":
        return min(gains) >= MIN_GAIN
    linear = [record["trained"]["linear"] for record in seeds]
    return min(gains) > max(linear) - min(linear)
