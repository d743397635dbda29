"""How far DALI's views are from torchvision's, sample by sample, operation by operation.

    python benchmarks/bench_parity.py --root DIR --size 32

Both backends get the same parameters; the figure is the mean absolute difference on the scale of 0 to 255.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sslx import data
from sslx.bench import measure
from sslx.data import sources
from sslx.data.sources import folder
from sslx.data.views import Augment, ViewSpec
from sslx.distributed import Ranks

RESULTS = Path(__file__).parent / "results" / "parity.jsonl"
PLAIN = Augment(flip=0, jitter=0, gray=0, blur=0)
JITTER = replace(PLAIN, jitter=1, brightness=0, contrast=0, saturation=0, hue=0)
OPERATIONS = {
    "crop, bilinear": PLAIN,
    "crop, bicubic": replace(PLAIN, interpolation="bicubic"),
    "flip": replace(PLAIN, flip=0.5),
    "brightness": replace(JITTER, brightness=0.8),
    "contrast": replace(JITTER, contrast=0.8),
    "saturation": replace(JITTER, saturation=0.8),
    "grayscale": replace(PLAIN, gray=1),
    "blur": replace(PLAIN, blur=1),
    "solarize": replace(PLAIN, solarize=1),
    "all but hue": replace(Augment(), hue=0, solarize=0.2),
    "hue, 0.1 turns": replace(JITTER, hue=0.1),
    "hue, 0.2 turns": replace(JITTER, hue=0.2),
}


def views(backend: str, root: Path, settings: data.Config, augment: Augment, images: int) -> Tensor:
    """(images, 3, size, size) on the scale of 0 to 255."""
    assert settings.size is not None
    loader = data.training(
        replace(settings, backend=backend, threads=1 if backend == "dali" else 0),  # pyright: ignore[reportArgumentType]
        sources.build(folder.Config(root=root), "pretrain"),
        [ViewSpec(size=settings.size, augment=augment, mean=(0, 0, 0), std=(1, 1, 1))],
        batch_size=images,
        seed=0,
        ranks=Ranks(device=torch.device("cpu")),
        dtype=torch.float32,
    )
    return next(loader).views[0] * 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of images")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    settings = data.Config(size=args.size)
    found: dict[str, float] = {}
    for name, augment in OPERATIONS.items():
        ours, theirs = (
            views(backend, args.root, settings, augment, args.images) for backend in ("dali", "torchvision")
        )
        found[name] = float((ours - theirs).abs().mean())
        print(f"{name:16} {found[name]:6.2f}")
    if not args.no_record:
        record = {"benchmark": "parity", "images": args.root.name, "num_images": args.images, "size": args.size}
        measure.append(RESULTS, {**record, "mean_difference_of_255": found})


if __name__ == "__main__":
    main()
