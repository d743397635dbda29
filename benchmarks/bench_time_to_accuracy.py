"""Accuracy of a linear probe over wall time: sslx beside lightly and beside a script like those of tutorials.

    python benchmarks/run.py time_to_accuracy --root DIR                                 (100 minutes)

plain: three convolutions, torchvision's transforms, Adam (``peers.py``), probed several times during half an hour.
lightly: tuned (channels-last, compiled, bf16 on AMX), with the small ResNet of ``simclr_cifar10_cpu``, otherwise with
the settings of its example.  sslx: ``simclr_cifar10_6min``, in separate runs whose schedules end after 2, 4 and 6
minutes.  Time counts from the start of the command, and no compiled model is kept from run to run (except the header
that Inductor precompiles once per machine).  The same probes score all encoders, on the same 32 px views.  Parts that
the results file has of this machine are left out.  Fails if sslx needs more than ``LIMIT_S`` for the accuracy that the
plain script reaches at its end.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_methods
import images
import peers
import torch
from harness import Record, Session, benchmark, option
from pretraining import TrainingRun, by_name
from torch import nn

from sslx import config, data, probe
from sslx.bench import measure
from sslx.data import sources
from sslx.data.sources import folder
from sslx.data.views import IMAGENET_MEAN, IMAGENET_STD, eval_view
from sslx.distributed import Ranks
from sslx.probe import features

PEERS = {
    "plain": (["plain", "--encoder", "cnn", "--workers", "2"], "cnn"),
    "lightly": (["lightly", "--tuned", "--encoder", "small resnet", "--workers", "2"], "small resnet"),
}
RECIPE = "simclr_cifar10_6min"
CALIBRATION_STEPS = 240
LIMIT_S = 360


@benchmark(
    images.CIFAR10,
    images.LABEL,
    option("--runs", type=Path, default=Path("runs"), help="folder of the runs of sslx"),
    option("--marks-s", type=float, nargs="+", default=(120, 360, 600, 1200, 1800), help="when peers are probed"),
    option("--sslx-s", type=float, nargs="+", default=(120, 240, 360), help="lengths of the runs of sslx"),
)
def run(session: Session) -> bool:
    for name in PEERS:
        if not of(session, name):
            train_peer(session, name)
    if missing := set(session.options.sslx_s) - {record["budget_s"] for record in of(session, "sslx")}:
        train_sslx(session, sorted(missing))
    for name in (*PEERS, "sslx"):
        points = (f"{record['train_s']:.0f} s: {100 * record['linear']:.1f} %" for record in of(session, name))
        print(name, *points, sep="  ")
    goal = of(session, "plain")[-1]["linear"]
    return any(record["linear"] >= goal and record["train_s"] <= LIMIT_S for record in of(session, "sslx"))


def of(session: Session, peer: str) -> list[Record]:
    """The lines of a peer on this machine."""
    machine = {key: value for key, value in measure.stamp().items() if key in measure.MACHINE}
    recipe = recipe_key() if peer == "sslx" else {}
    return session.recorded(peer=peer, images=session.options.images, **machine, **recipe)


def recipe_key() -> Record:
    """The recipe of sslx, and its digest."""
    return {"recipe": RECIPE, "recipe_sha256": bench_methods.recipe_digest(config.recipes()[RECIPE])}


def record(session: Session, peer: str, **figures: Any) -> None:
    """Record a point of a peer's curve."""
    precision = "float32" if peer == "plain" else peers.PRECISION
    session.record(peer=peer, images=session.options.images, view_px=peers.SIZE, precision=precision, **figures)


def train_peer(session: Session, name: str) -> None:
    """Train a peer once, and probe its encoder at every mark, after the training."""
    argv, shape = PEERS[name]
    options, points = session.options, list[Record]()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, str(Path(peers.__file__)), *argv, "--root", str(options.root), "--out", folder]
        command += ["--save-at", *map(str, options.marks_s), "--since", str(time.time())]
        environ = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environ).stdout
        for mark, line in zip(options.marks_s, map(json.loads, out.splitlines()), strict=True):
            encoder = peers.encoder_of(shape)
            encoder.load_state_dict(torch.load(Path(folder) / f"{name}_{mark:.0f}.pt"))
            point = {"budget_s": mark, "train_s": line["at_s"], "samples": line["samples"], "encoder": shape}
            points.append(point | scores(options.root, encoder))
    for point in points:  # only once all are measured: a curve that stops half-way would count as complete
        record(session, name, **point)


def scores(root: Path, encoder: nn.Module) -> dict[str, float | None]:
    """The kNN and linear accuracy of an encoder, by the probes of sslx."""
    settings, cpu = folder.Config(root=root), Ranks(device=torch.device("cpu"))
    train = sources.build(settings, "train")
    test = sources.build(settings, "test", training=train)
    view = eval_view(peers.SIZE, IMAGENET_MEAN, IMAGENET_STD)
    extracted = [
        features.extract(
            encoder,
            data.evaluation(data.Config(), split, view, batch_size=256, ranks=cpu, dtype=torch.float32),
            num_samples=len(split),
        )
        for split in (train, test)
    ]
    probes, num_classes = probe.Config(k=(200,), shots=(), fractions=()), len(train.facts.classes or ())
    score = probe.evaluate(probes, extracted[0], extracted[1], "encoder", num_classes)
    return {"knn": score.knn, "linear": score.linear}


def train_sslx(session: Session, budgets_s: list[float]) -> None:
    """Train sslx once per budget, with as many steps as fit at the speed of a short run before."""
    training = TrainingRun(session.options.runs / "bench_time_to_accuracy")
    elapsed_s = pretrain(training, session.options.root, CALIBRATION_STEPS)
    speed, batch_size = training.samples_per_s(), training.config()["batch_size"]
    overhead_s = elapsed_s - CALIBRATION_STEPS * batch_size / speed
    for budget_s in budgets_s:
        steps = round((0.98 * budget_s - overhead_s) * speed / batch_size)
        if steps < 1:
            raise SystemExit(f"{budget_s:.0f} s are too short: starting and compiling take {overhead_s:.0f} s here")
        elapsed_s = pretrain(training, session.options.root, steps)
        linear = by_name(training.probe("--no-baselines", "--probe.shots", "--probe.fractions"))["pretrained encoder"]
        record(session, "sslx", budget_s=budget_s, train_s=elapsed_s, samples=steps * batch_size,
               encoder="narrow resnet", config=training.config(), **recipe_key(), **linear)  # fmt: skip


def pretrain(training: TrainingRun, root: Path, steps: int) -> float:
    """Seconds of a run that compiles anew."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        bench_methods.pretrain(training, root, RECIPE, steps, 0, compile="on", TORCHINDUCTOR_CACHE_DIR=cache)
    return time.perf_counter() - start
