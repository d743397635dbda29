"""What a step of each recipe does to a GPU, counted on fake CUDA tensors: needs no GPU, and times nothing.

    python benchmarks/bench_counts.py            compares with the table, as tests/benchmarks/test_counts.py does
    python benchmarks/bench_counts.py --write    adds the cases that differ to benchmarks/results/counts.jsonl
    --only simclr_imagenet ...                   some of the cases

From images in the GPU's memory to the update, uncompiled, on one of the GPUs that share the recipe's batch: kernels
launched, collectives, copies from the host, waits of the host, bytes that all operators read and write, and the peak
of memory, without what an allocator and DDP's buckets add.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import fake_step

from sslx import config
from sslx.bench import measure
from sslx.config import flags

RESULTS = Path(__file__).parent / "results" / "counts.jsonl"
MOST = 0.1
"""The share by which a figure may differ from the table's without a word."""
FIGURES = ("launches", "collectives", "copies", "waits", "moved_bytes", "peak_bytes")
_GPUS = {"simclr_imagenet": 8}
_OTHERS = {
    "dino_photos, ViT-S/16": ["dino_photos", "--encoder.name", "vit_small_patch16_224"],
    "simclr_imagenet, local batch norm": ["simclr_imagenet", "--batch-norm", "local", "--batch-size", "512"],
}


def cases() -> dict[str, list[str]]:
    """Each recipe for GPUs, and what else is counted, by its flags."""
    return {name: [name] for name in flags.recipes() if name.endswith(("_photos", "_cifar10", "_imagenet"))} | _OTHERS


def count(name: str) -> dict[str, Any]:
    """A case's figures, with the pixels and samples that they are of."""
    settings = config.load([*cases()[name], "--device", "cuda"], gpu=True, quiet=True)
    side = settings.data.size or 224
    settings, _ = config.settle(settings, side)
    per_gpu = settings.batch_size // _GPUS.get(name, 1)
    counts = fake_step.counts(settings, side, per_gpu, _GPUS.get(name, 1))
    return {
        "case": name,
        "encoder": settings.encoder.name,
        "pixels": side,
        "samples": per_gpu,
        "optimizer": settings.optim.name,
        "batch_norm": settings.batch_norm,
        "ranks": _GPUS.get(name, 1),
        "launches": counts.launches,
        "collectives": counts.collectives,
        "copies": len(counts.copies),
        "waits": len(counts.reads),
        "moved_bytes": counts.moved_bytes,
        "peak_bytes": counts.peak_bytes,
    }


def table(path: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The last line of each case."""
    records = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()
    return {record["case"]: record for record in records}


SHOWN = {
    "simclr_imagenet, local batch norm": "SimCLR, ResNet-50, 224 px, 512",
    "simclr_imagenet": "the same, synchronized batch norm, one of 8 GPUs",
    "simclr_cifar10": "SimCLR, ResNet-18, 32 px, 512",
    "dino_photos, ViT-S/16": "DINO, ViT-S/16, 224 px and small crops, 256",
}
"""The cases of the README, and what each is called there."""


def markdown(path: Path = RESULTS) -> str:
    """The README's table: each case's first line and its last."""
    rows = [
        "| step | kernels launched | copies | waits | GB moved | peak, GiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    scales = {"launches": 1.0, "copies": 1.0, "waits": 1.0, "moved_bytes": 1e9, "peak_bytes": 2.0**30}
    for case, name in SHOWN.items():
        mine = [line for line in lines if line["case"] == case]
        cells = [[f"{line[figure] / scale:,.0f}" for line in (mine[0], mine[-1])] for figure, scale in scales.items()]
        texts = [now if len(mine) == 1 or before == now else f"{before} → {now}" for before, now in cells]
        rows.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(rows) + "\n"


def differences(now: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    """Where a case's figures differ by more than ``MOST``, in words."""
    if before is None:
        return [f"{now['case']} is not in the table"]
    return [
        f"{now['case']}: {figure} {before[figure]:,} -> {now[figure]:,}"
        for figure in FIGURES
        if abs(now[figure] - before[figure]) > MOST * before[figure]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(cases()), choices=cases())
    parser.add_argument("--write", action="store_true", help="add what differs to the table")
    args = parser.parse_args()
    known, differ = table(), False
    for name in args.only:
        found = count(name)
        lines = differences(found, known.get(name))
        differ |= bool(lines)
        sys.stdout.write("".join(f"{line}\n" for line in lines) or f"{name}: as in the table\n")
        sys.stdout.flush()
        if lines and args.write:
            measure.append(RESULTS, {"benchmark": "counts", **found})
    return int(differ and not args.write)


if __name__ == "__main__":
    raise SystemExit(main())
