"""Do scores without labels rank runs as accuracies do?  Short runs of every method and several settings on digits.

    python benchmarks/run.py label_free                          (39 runs, about half an hour on two cores)
    python benchmarks/run.py label_free --methods simclr mae --settings recipe weak --steps 4 --no-record

Every method trains for a few steps with the settings of its recipe for digits, with a tenth of its learning rate, and
with an augmentation that hardly changes an image.  ``sslx probe`` scores all encoders on the same test images and
augmentation, and ``sslx compare`` ranks them: Spearman's rho of each score with the kNN and linear accuracies, and its
interval, are one line of the results.  A run that is done is not trained again, and features stay in its folder, so a
stopped benchmark continues.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_accuracy import finished_at
from bench_methods import recipe_digest
from harness import Record, Session, benchmark, digest, option
from pretraining import TrainingRun

from sslx import config, methods

SETTINGS = ("recipe", "low-lr", "weak")
EVAL_SIZE = 16  # pixels of the view that is probed, the same for all
FEWER_PROBES = ["--no-baselines", "--probe.shots", "--probe.fractions"]


@benchmark(
    option("--methods", nargs="+", default=list(methods.available()), choices=methods.available()),
    option("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS),
    option("--steps", type=int, default=40, help="training steps of each run"),
    option("--seed", type=int, default=0),
    option("--runs", type=Path, default=Path("runs/label_free"), help="folder of the runs"),
)
def run(session: Session) -> None:
    options = session.options
    key: Record = {"steps": options.steps, "seed": options.seed, "methods": options.methods}
    key |= {"settings": options.settings, "images": "digits", "view_px": EVAL_SIZE}
    key["recipes_sha256"] = digest({name: recipe_digest(recipe(name)) for name in options.methods})
    record = session.part(key, lambda: measure_agreement(session))
    for score, by_accuracy in record["agreement"].items():
        found = (f"{name} {text(each)}" for name, each in by_accuracy.items())
        print(f"{score:12} rho with {', '.join(found)}, {record['num_runs']} runs")


def measure_agreement(session: Session) -> Record:
    """Train what is not yet trained, probe all runs together, and compare them."""
    options = session.options
    pairs = [(method, setting) for setting in options.settings for method in options.methods]
    folders = list[Path]()
    for number, (method, setting) in enumerate(pairs, 1):
        print(f"{number} of {len(pairs)}: {method}, {setting}", flush=True)
        folders.append(trained(options.runs, method, setting, options.steps, options.seed))
    sslx("probe", *map(str, folders), "--data.eval-size", str(EVAL_SIZE), *FEWER_PROBES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "comparison.json"
        sslx("compare", *map(str, folders), "--json", str(path))
        compared = json.loads(path.read_text())
    names = {str(folder): f"{method}, {setting}" for folder, (method, setting) in zip(folders, pairs, strict=True)}
    runs = [
        {"run": names[line["folder"]]} | {key: rounded(value) for key, value in line.items() if key != "folder"}
        for line in compared["runs"]
    ]
    return {"num_runs": len(runs), "agreement": compared["agreement"], "interval": compared["interval"], "of": runs}


def trained(runs: Path, method: str, setting: str, steps: int, seed: int) -> Path:
    """Return the folder of a run, which is trained if it is not done."""
    flags = [*setting_flags(method, setting), "--steps", str(steps), "--seed", str(seed), "--online.every", "0"]
    name = f"{method}-{setting}-{digest({'flags': flags, 'recipe': recipe_digest(recipe(method))})}"
    training = TrainingRun(runs / name)
    if finished_at(training.folder) is None:
        training.pretrain(recipe(method).stem, *flags, "--log.every", str(steps), "--resume", "auto")
    return training.folder


def setting_flags(method: str, setting: str) -> list[str]:
    """Return the flags of ``sslx pretrain`` by which a setting differs from the method's recipe."""
    if setting == "low-lr":
        return ["--optim.lr", f"{config.load([recipe(method).stem]).optim.lr / 10:g}"]
    return ["--augment.min-scale", "0.9", "--augment.jitter", "0"] if setting == "weak" else []


def recipe(method: str) -> Path:
    return config.recipes()[f"{method}_digits"]


def sslx(*arguments: str) -> None:
    """Run a command of sslx in a process of its own; if it fails, the benchmark fails."""
    subprocess.run([sys.executable, "-m", "sslx", *arguments], check=True)


def rounded(value: object) -> object:
    return round(value, 4) if isinstance(value, float) else value


def text(found: Record) -> str:
    """Return rho and its interval."""
    interval = "" if found["low"] is None else f" [{found['low']:.2f}, {found['high']:.2f}]"
    return f"{found['rho']:.2f}{interval}"
