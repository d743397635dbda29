"""Linear-probe accuracy over wall time: sslx beside lightly and beside the script that tutorials start from.

    python benchmarks/bench_time_to_accuracy.py --root DIR      (DIR/train/CLASS/*, DIR/test/CLASS/*; 100 minutes)

plain: three convolutions, torchvision's transforms, Adam (``peers.py``), looked at again and again during half an hour.
lightly: tuned (channels-last, compiled, bf16 on AMX), with the small ResNet of ``simclr_cifar10_cpu``, otherwise its
example's settings.  sslx: ``simclr_cifar10_6min`` in runs of their own of so many minutes each, whose schedules end
there.  Time counts from the start of the command; no compiled model is kept from run to run (the header that Inductor
precompiles once on a machine is).  All encoders are probed by the same probes on the same 32 px views.  Parts that the
results file has of this machine are left out.  Fails where sslx needs more than ``LIMIT_S`` for what the plain script
reaches at its end.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_methods
import peers
import torch
from torch import nn

from sslx import config, data, probe
from sslx.bench import measure
from sslx.data import sources
from sslx.data.sources import folder
from sslx.data.views import IMAGENET_MEAN, IMAGENET_STD, eval_view
from sslx.distributed import Ranks
from sslx.probe import features

RESULTS = Path(__file__).parent / "results" / "time_to_accuracy.jsonl"
PEERS = {
    "plain": (["plain", "--encoder", "cnn", "--workers", "2"], "cnn"),
    "lightly": (["lightly", "--tuned", "--encoder", "small resnet", "--workers", "2"], "small resnet"),
}
MARKS_S = (120, 360, 600, 1200, 1800)
SSLX_S = (120, 240, 360)
RECIPE = "simclr_cifar10_6min"
CALIBRATION_STEPS = 240
LIMIT_S = 360
Record = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="CIFAR-10 as folders of images")
    parser.add_argument("--images", default="CIFAR-10 (JPEG q75)", help="what the images are, for the record")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--marks-s", type=float, nargs="+", default=MARKS_S)
    parser.add_argument("--sslx-s", type=float, nargs="+", default=SSLX_S)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    for name in PEERS:
        if not of(args, name):
            curve(args, name)
    missing = set(args.sslx_s) - {r["budget_s"] for r in of(args, "sslx")}
    if missing:
        ours(args, sorted(missing))
    for name in (*PEERS, "sslx"):
        print(name, *(f"{r['train_s']:.0f} s: {100 * r['linear']:.1f} %" for r in of(args, name)), sep="  ")
    goal = of(args, "plain")[-1]["linear"]
    return 0 if any(r["linear"] >= goal and r["train_s"] <= LIMIT_S for r in of(args, "sslx")) else 1


def of(args: argparse.Namespace, peer: str) -> list[Record]:
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    key = {key: value for key, value in measure.stamp().items() if key in measure.MACHINE}
    key |= {"peer": peer, "images": args.images} | (recipe() if peer == "sslx" else {})
    return [record for record in map(json.loads, lines) if record.items() >= key.items()]


def recipe() -> Record:
    return {"recipe": RECIPE, "recipe_sha256": bench_methods.digest(config.recipes()[RECIPE])}


def write(args: argparse.Namespace, peer: str, **figures: Any) -> None:
    record = {"benchmark": "time_to_accuracy", "peer": peer, "images": args.images, "view_px": peers.SIZE, **figures}
    record |= {"precision": peers.PRECISION if peer != "plain" else "float32"}
    measure.append(args.results, record)


def curve(args: argparse.Namespace, name: str) -> None:
    """One run of a peer, probed at every mark, after its end."""
    argv, shape = PEERS[name]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, str(Path(peers.__file__)), *argv, "--root", str(args.root), "--out", folder]
        command += ["--save-at", *map(str, args.marks_s), "--since", str(time.time())]
        here = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=here).stdout
        found: list[Record] = []
        for mark, line in zip(args.marks_s, map(json.loads, out.splitlines()), strict=True):
            encoder = peers.encoder_of(shape)
            encoder.load_state_dict(torch.load(Path(folder) / f"{name}_{mark:.0f}.pt"))
            part = {"budget_s": mark, "train_s": line["at_s"], "samples": line["samples"], "encoder": shape}
            found.append(part | score(args, encoder))
    for part in found:  # all or none: a curve that stops half-way would be taken for a whole one
        write(args, name, **part)


def score(args: argparse.Namespace, encoder: nn.Module) -> dict[str, float | None]:
    """kNN and linear accuracy of an encoder, by sslx's probes."""
    images = folder.Config(root=args.root)
    train = sources.build(images, "train")
    test = sources.build(images, "test", training=train)
    view = eval_view(peers.SIZE, IMAGENET_MEAN, IMAGENET_STD)
    cpu = Ranks(device=torch.device("cpu"))
    made = [
        features.extract(
            encoder,
            data.evaluation(data.Config(), split, view, batch_size=256, ranks=cpu, dtype=torch.float32),
            num_samples=len(split),
        )
        for split in (train, test)
    ]
    found = probe.evaluate(probe.Config(shots=()), made[0], made[1], "encoder", len(train.facts.classes or ()))
    return {"knn": found.knn, "linear": found.linear}


def ours(args: argparse.Namespace, budgets_s: list[float]) -> None:
    """A run of sslx for each budget, which ends after about so long by the speed of a short one before."""
    speed, overhead = trained(args, CALIBRATION_STEPS)
    batch_size = bench_methods.run_config(args)["batch_size"]
    for seconds in budgets_s:
        steps = round((0.98 * seconds - overhead) * speed / batch_size)
        if steps < 1:
            raise SystemExit(f"no step in {seconds:.0f} s: starting and compiling take {overhead:.0f} s here")
        start = time.perf_counter()
        trained(args, steps)
        spent = time.perf_counter() - start
        scores = bench_methods.probe(args, baselines=False)["pretrained encoder"]
        write(args, "sslx", budget_s=seconds, train_s=spent, samples=steps * batch_size, encoder="narrow resnet",
              config=bench_methods.run_config(args), **recipe(), **scores)  # fmt: skip


def trained(args: argparse.Namespace, steps: int) -> tuple[float, float]:
    """(samples/s, seconds around the steps) of a run that compiles anew."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        speed, _ = bench_methods.pretrain(args, RECIPE, 0, steps, compile="on", cache=cache)
    return speed, time.perf_counter() - start - steps * bench_methods.run_config(args)["batch_size"] / speed


if __name__ == "__main__":
    sys.exit(main())
