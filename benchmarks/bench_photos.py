"""Whether each recipe METHOD_photos learns from photos: a short run of each, its health, and its features' kNN.

    python benchmarks/bench_photos.py --root TRAIN --each 200 --what "2,000 CIFAR-10 images" --narrow -- --epochs 15
    python benchmarks/bench_photos.py --narrow -- --epochs 15

--root: images in class folders, which the probe's held-out part gets its labels from; training does not look at them,
but for supcon.  --each: of every class the first so many.  Without --root: 400 crops of 160 px of the two photos that
come with scikit-learn.  --narrow: small encoders, for minutes on a CPU.  What comes after -- goes to sslx pretrain, of
every method.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from sslx import methods
from sslx.bench import measure
from sslx.runs import records

SMALL, BUNDLED = "2,000 CIFAR-10 images", "400 crops of scikit-learn's two photos"
NARROW = {
    "resnet": ["--encoder.layers", *"1111", "--encoder.channels", "32", "64", "128", "256"],
    "vit": ["--encoder.name", "vit_tiny_patch16_224", "--encoder.layers", "4", "--encoder.channels", "128"],
}
RESULTS = Path(__file__).parent / "results" / "photos.jsonl"


def bundled(folder: Path, number: int = 400, side: int = 160) -> None:
    """Crops of scikit-learn's two photos, one folder each: what one has without a download."""
    generator = np.random.default_rng(0)
    for name, photo in zip(("temple", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir(parents=True)
        for count in range(number // 2):
            top, left = (int(generator.integers(0, size - side)) for size in photo.shape[:2])
            Image.fromarray(photo[top : top + side, left : left + side]).save(
                folder / name / f"{count}.jpg", quality=90
            )


def part(folder: Path, root: Path, each: int) -> None:
    """The first ``each`` files, by name, of every class of ``root``."""
    for place in sorted(root.iterdir()):
        (folder / place.name).mkdir(parents=True)
        for file in sorted(place.iterdir())[:each]:
            shutil.copy(file, folder / place.name)


def train(method: str, root: Path, runs: Path, flags: list[str]) -> dict[str, object]:
    """One run and its probe: what they say."""
    command = [sys.executable, "-m", "sslx", "pretrain", f"{method}_photos", "--source.root", str(root)]
    start = time.monotonic()
    done = subprocess.run([*command, "--runs", str(runs), *flags], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{method}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    seconds = time.monotonic() - start
    run = runs / f"{method}_photos"
    lines = list(records.read_metrics(run / "metrics.jsonl"))
    losses = [line["loss"] for line in lines if "loss" in line]
    last = {key: value for line in lines for key, value in line.items()}
    subprocess.run([sys.executable, "-m", "sslx", "probe", str(run)], capture_output=True, check=True)
    scores = json.loads((run / "probe.json").read_text())["scores"]
    return {
        "steps": int(last["step"]),
        "train_s": round(seconds, 1),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "feature_rank": last["feature_rank"],
        "scores": scores,
    }


def markdown(path: Path = RESULTS) -> str:
    """The README's table: of each method its newest line for each set of images."""
    lines = {(r["images"], r["method"]): r for r in map(json.loads, path.read_text().splitlines())}
    rows = [
        "| method | kNN | linear | untrained encoder: kNN, linear | crops: loss, first to last | directions in use |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for method in methods.available():
        small, crops = lines[SMALL, method], lines[BUNDLED, method]
        before, after = ([f"{100 * score[key]:.1f}" for key in ("knn", "linear")] for score in small["scores"][-2:])
        loss = f"{crops['first_loss']:.2f} to {crops['last_loss']:.2f}"
        cells = [f"`{method}`", *after, ", ".join(before), loss, f"{crops['feature_rank']:.0f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--each", type=int, help="images of each class; default: all")
    parser.add_argument("--what", default=BUNDLED, help="what the images are")
    parser.add_argument("--only", nargs="+", default=list(methods.available()), choices=methods.available())
    parser.add_argument("--narrow", action="store_true", help="small encoders")
    parser.add_argument("--results", type=Path, default=RESULTS)
    ours, flags = sys.argv[1:], list[str]()
    if "--" in ours:
        ours, flags = ours[: ours.index("--")], ours[ours.index("--") + 1 :]
    args = parser.parse_args(ours)
    if args.root and args.what == BUNDLED:
        parser.error("--root needs --what, the words for its images")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        if not args.root:
            bundled(root)
        elif args.each:
            part(root, args.root, args.each)
        else:
            root = args.root
        for method in args.only:
            narrow = NARROW["vit" if method == "mae" else "resnet"] if args.narrow else []
            record = train(method, root, Path(folder) / "runs", [*narrow, *flags])
            measure.append(
                args.results,
                {
                    "benchmark": "photos",
                    "method": method,
                    "images": args.what,
                    "narrow": args.narrow,
                    "flags": flags,
                    **record,
                },
            )
            sys.stdout.write(f"{method}: {json.dumps(record)}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
