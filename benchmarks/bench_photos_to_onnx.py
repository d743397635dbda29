"""Time the README's three commands: from a folder of photos to an encoder, its report and its ONNX file.

    python benchmarks/run.py photos_to_onnx --root CIFAR10      (about ten minutes)

Digits are trained on by the recipe ``simclr_digits``, and 2,000 images of CIFAR10, 200 of each class, as a folder of
one's own, with no settings but its place.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import Session, benchmark
from images import CIFAR10, flags, paths

LIMIT_S = 600
IMAGES_PER_CLASS = 200


@benchmark(CIFAR10)
def run(session: Session) -> bool:
    limits_kept: list[bool] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in sorted((session.options.root / "train").iterdir()):
            images = folder / "photos" / kind.name
            images.mkdir(parents=True)
            for path in paths(kind)[:IMAGES_PER_CLASS]:
                (images / Path(path).name).symlink_to(path)
        for images, chosen in (("digits", ["simclr_digits"]), ("photos", flags("folder", folder / "photos"))):
            seconds = {
                command: _seconds(folder, command, images, *more)
                for command, more in {"pretrain": chosen, "report": [], "export": ["--to", "onnx"]}.items()
            }
            run = folder / "runs" / images
            scores = json.loads((run / "probe.json").read_text())["scores"]
            found = sorted(path.name for path in (run / "export").rglob("*.onnx"))
            whole = bool(found) and (run / "report.html").stat().st_size > 0
            session.record(
                images=images, total_s=round(sum(seconds.values()), 1), seconds=seconds, scores=scores, files=found
            )
            print(f"{images}: {sum(seconds.values()):.0f} s (limit {LIMIT_S} s): {seconds}, {found}")
            limits_kept.append(whole and sum(seconds.values()) <= LIMIT_S)
    return all(limits_kept)


def _seconds(folder: Path, command: str, images: str, *more: str) -> float:
    where = ["--name", images] if command == "pretrain" else [f"runs/{images}"]
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "sslx", command, *more, *where], cwd=folder, check=True)
    return round(time.monotonic() - start, 1)
