"""Kernels, copies, bytes and memory of a step of each recipe on a GPU, counted on fake CUDA tensors without a GPU.

    python benchmarks/run.py counts            compares with results/counts.jsonl; fails if they differ by over a tenth
    python benchmarks/run.py counts --write    appends the cases that differ
    python benchmarks/run.py counts --only simclr_imagenet

Nothing is timed.  A step goes from images in the GPU's memory to the update, uncompiled, on one of the GPUs that share
the recipe's batch.  Counted are kernels launched, collectives, copies from the host, waits of the host, bytes that all
operators read and write, and the peak of memory, without what an allocator and DDP's buckets add.
"""

import json
from pathlib import Path
from typing import Any

import fake_step
from harness import FOLDER, Record, Session, benchmark, option

from sslx import config
from sslx.config import flags

MAX_DIFFERENCE = 0.1
"""Largest relative difference from the recorded figure that passes."""
FIGURES = ("launches", "collectives", "copies", "waits", "moved_bytes", "peak_bytes")
_GPUS = {"simclr_imagenet": 8}
_OTHERS = {
    "dino_photos, ViT-S/16": ["dino_photos", "--encoder.name", "vit_small_patch16_224"],
    "simclr_imagenet, local batch norm": ["simclr_imagenet", "--batch-norm", "local", "--batch-size", "512"],
}


def cases() -> dict[str, list[str]]:
    """The flags of each recipe for GPUs and of a few others, by name."""
    return {name: [name] for name in flags.recipes() if name.endswith(("_photos", "_cifar10", "_imagenet"))} | _OTHERS


def count(name: str) -> dict[str, Any]:
    """The figures of a case, with its size in pixels and samples."""
    settings = config.load([*cases()[name], "--device", "cuda"], gpu=True, quiet=True)
    side = settings.data.size or 224
    settings, _ = config.settle(settings, side)
    per_gpu = settings.batch_size // _GPUS.get(name, 1)
    counts = fake_step.counts(settings, side, per_gpu, _GPUS.get(name, 1))
    figures: Record = {"case": name, "encoder": settings.encoder.name, "pixels": side, "samples": per_gpu}
    figures |= {"optimizer": settings.optim.name, "batch_norm": settings.batch_norm, "ranks": _GPUS.get(name, 1)}
    figures |= {"launches": counts.launches, "collectives": counts.collectives, "copies": len(counts.copies)}
    return figures | {"waits": len(counts.reads), "moved_bytes": counts.moved_bytes, "peak_bytes": counts.peak_bytes}


def recorded(path: Path = FOLDER / "results" / "counts.jsonl") -> dict[str, Record]:
    """The newest line of each case."""
    return {record["case"]: record for record in map(json.loads, path.read_text().splitlines())}


def differences(figures: Record, known: Record | None) -> list[str]:
    """The figures of a case that differ too much from the recorded ones, in words."""
    if known is None:
        return [f"{figures['case']} is not in results/counts.jsonl"]
    return [
        f"{figures['case']}: {name} {known[name]:,} -> {figures[name]:,}"
        for name in FIGURES
        if abs(figures[name] - known[name]) > MAX_DIFFERENCE * known[name]
    ]


@benchmark(
    option("--only", nargs="+", default=list(cases()), choices=cases(), help="count only these cases"),
    option("--write", action="store_true", help="append the cases that differ to the results"),
)
def run(session: Session) -> bool:
    known, passed = recorded(), True
    for name in session.options.only:
        figures = count(name)
        lines = differences(figures, known.get(name))
        print("\n".join(lines) or f"{name}: as recorded", flush=True)
        if lines and session.options.write:
            session.record(**figures)
        passed = passed and (not lines or session.options.write)
    return passed
