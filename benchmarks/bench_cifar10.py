"""SimCLR on CIFAR-10 in ten minutes on 2 CPU cores: ``sslx pretrain`` on the clock, then the probes.

    python benchmarks/bench_cifar10.py --root DIR       (DIR/train/CLASS/*, DIR/test/CLASS/*)

Fails when training takes longer than 600 s or the linear probe stays under 60 %.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from sslx import measure

RESULTS = Path(__file__).parent / "results" / "cifar10.jsonl"
LIMIT_S, LINEAR = 600, 0.60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="CIFAR-10 as folders of images")
    parser.add_argument("--images", default="CIFAR-10 (JPEG q75)", help="what the images are, for the record")
    parser.add_argument("--recipe", default="simclr_cifar10_cpu")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    run = args.runs / "bench_cifar10"
    shutil.rmtree(run, ignore_errors=True)
    sslx = [sys.executable, "-m", "sslx"]
    source = [
        "--data.source",
        "folder",
        "--data.root",
        str(args.root),
        "--runs",
        str(args.runs),
        "--name",
        run.name,
    ]
    before = measure.stamp()
    start = time.perf_counter()
    subprocess.run([*sslx, "pretrain", args.recipe, *source], check=True)
    seconds = time.perf_counter() - start
    subprocess.run([*sslx, "probe", str(run)], check=True)
    found = json.loads((run / "probe.json").read_text())
    config = json.loads((run / "config.json").read_text())
    samples = found["step"] * config["batch_size"]
    linear = next(score["linear"] for score in found["scores"] if score["name"] == "pretrained encoder")
    passed = seconds <= LIMIT_S and linear >= LINEAR
    if not args.no_record:
        record = {"benchmark": "cifar10", "images": args.images, "recipe": args.recipe, "config": config}
        record |= {"load_before": before["load_1min"], "train_s": round(seconds, 1), "samples": samples}
        measure.append(RESULTS, {**record, "samples_per_s": samples / seconds, **found, "passed": passed})
    print(
        f"trained in {seconds:.0f} s (limit {LIMIT_S}), linear probe {100 * linear:.1f} % (at least {100 * LINEAR:.0f})"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
