"""Differences between the views of DALI and of torchvision, sample by sample, for each operation.

    python benchmarks/run.py parity --root DIR --size 32

Both backends get the same parameters.  A figure is the mean absolute difference on the scale of 0 to 255.
"""

from dataclasses import replace
from pathlib import Path

import torch
from harness import Session, benchmark, option
from torch import Tensor

from sslx import data
from sslx.data import sources
from sslx.data.sources import folder
from sslx.data.views import Augment, ViewSpec
from sslx.distributed import Ranks

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
    "vertical flip": replace(PLAIN, vertical_flip=1),
    "right angles": replace(PLAIN, right_angles=1),
    "rotation": replace(PLAIN, rotate=1),
    "gain": replace(PLAIN, gain=1),
    "noise": replace(PLAIN, noise=1),
    "hue, 0.1 turns": replace(JITTER, hue=0.1),
    "hue, 0.2 turns": replace(JITTER, hue=0.2),
}


def views(root: Path, size: int, backend: str, augment: Augment, num_images: int) -> Tensor:
    """Views (num_images, 3, size, size) on the scale of 0 to 255."""
    loader = data.training(
        data.Config(size=size, backend=backend, threads=1 if backend == "dali" else 0),  # pyright: ignore[reportArgumentType]
        sources.build(folder.Config(root=root), "pretrain"),
        [ViewSpec(size=size, augment=augment, mean=(0, 0, 0), std=(1, 1, 1))],
        batch_size=num_images,
        seed=0,
        ranks=Ranks(device=torch.device("cpu")),
        dtype=torch.float32,
    )
    return next(loader).views[0] * 255


@benchmark(
    option("--root", type=Path, required=True, help="folder of images"),
    option("--size", type=int, default=224, help="side of the views, in pixels"),
    option("--images", type=int, default=128, help="number of images"),
)
def run(session: Session) -> None:
    options, differences = session.options, dict[str, float]()
    for name, augment in OPERATIONS.items():
        dali, torchvision = (
            views(options.root, options.size, backend, augment, options.images) for backend in ("dali", "torchvision")
        )
        differences[name] = float((dali - torchvision).abs().mean())
        print(f"{name:16} {differences[name]:6.2f}")
    session.record(images=options.root.name, num_images=options.images, size=options.size,
                   mean_difference_of_255=differences)  # fmt: skip
