"""Train each recipe METHOD_photos for a short time: does its loss fall, and what do its features know?

    python benchmarks/run.py photos --root TRAIN --each 200 --what "2,000 CIFAR-10 images" --narrow --epochs 15
    python benchmarks/run.py photos --narrow --epochs 15

Without --root, the images are 400 crops of 160 px of the two photos that come with scikit-learn.  Only supcon trains on
the labels (the class folders of --root); the probe reads them for all methods.  Other options are those of
``sslx pretrain`` and apply to every method.
"""

import json
import shutil
import tempfile
import time
from pathlib import Path

import images
import numpy as np
from harness import Record, Session, benchmark, option
from PIL import Image
from pretraining import TrainingRun
from sklearn.datasets import load_sample_images

from sslx import methods

BUNDLED = "400 crops of scikit-learn's two photos"
NARROW = {
    "resnet": ["--encoder.layers", *"1111", "--encoder.channels", "32", "64", "128", "256"],
    "vit": ["--encoder.name", "vit_tiny_patch16_224", "--encoder.layers", "4", "--encoder.channels", "128"],
}


@benchmark(
    option("--root", type=Path, help="images in class folders"),
    option("--each", type=int, help="take only the first images of each class, this many"),
    option("--what", default=BUNDLED, help="name of the images, for the record"),
    option("--only", nargs="+", default=list(methods.available()), choices=methods.available()),
    option("--narrow", action="store_true", help="small encoders, for minutes on a CPU"),
    passes_flags=True,
)
def run(session: Session) -> None:
    options = session.options
    if options.root and options.what == BUNDLED:
        raise SystemExit("--root needs --what, the name of its images")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        if not options.root:
            crop_bundled_photos(root)
        elif options.each:
            copy_first(options.root, root, options.each)
        else:
            root = options.root
        for method in options.only:
            narrow = NARROW["vit" if method == "mae" else "resnet"] if options.narrow else []
            figures = train(method, root, Path(folder) / "runs", [*narrow, *session.flags])
            session.record(method=method, images=options.what, narrow=options.narrow, flags=session.flags, **figures)
            print(f"{method}: {json.dumps(figures)}", flush=True)


def crop_bundled_photos(folder: Path, number: int = 400, side: int = 160) -> None:
    """Write random crops of scikit-learn's two photos, one class folder for each photo."""
    generator = np.random.default_rng(0)
    for name, photo in zip(("temple", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir(parents=True)
        for count in range(number // 2):
            top, left = (int(generator.integers(0, size - side)) for size in photo.shape[:2])
            crop = Image.fromarray(photo[top : top + side, left : left + side])
            crop.save(folder / name / f"{count}.jpg", quality=90)


def copy_first(root: Path, folder: Path, each: int) -> None:
    """Copy the first ``each`` files, by name, of every class of ``root``."""
    for place in sorted(root.iterdir()):
        (folder / place.name).mkdir(parents=True)
        for file in sorted(place.iterdir())[:each]:
            shutil.copy(file, folder / place.name)


def train(method: str, root: Path, runs: Path, flags: list[str]) -> Record:
    """Train and probe one method."""
    training, start = TrainingRun(runs / f"{method}_photos"), time.monotonic()
    training.pretrain(f"{method}_photos", *images.flags("folder", root), *flags)
    train_s = round(time.monotonic() - start, 1)
    lines = training.metrics()
    losses = [line["loss"] for line in lines if "loss" in line]
    last = {key: value for line in lines for key, value in line.items()}
    figures: Record = {"steps": int(last["step"]), "train_s": train_s, "feature_rank": last["feature_rank"]}
    return figures | {"first_loss": losses[0], "last_loss": losses[-1], "scores": training.probe()["scores"]}
