"""Whether a view depends on its batch: the same samples finished and cropped in batches of many sizes.

A module and a script: ``python batches.py SIZE ...`` prints a line for each difference, for processes that imitate
another CPU.
"""

import itertools
import sys
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sslx.data import views
from sslx.data.backends import resident
from sslx.data.backends.color import Finish
from sslx.data.views import Augment, ViewSpec

RECIPES = (
    Augment(blur=0.5, solarize=0.3, gray=0.3, jitter=0.5),
    Augment(
        blur=0.9, solarize=0.5, interpolation="bicubic", max_scale=0.6,
        vertical_flip=0.5, right_angles=0.5, rotate=0.5, gain=0.5,
    ),
)  # fmt: skip
Rows = npt.NDArray[np.int64]


def differences(size: int, number: int, generator: np.random.Generator) -> Iterator[str]:
    """One line for each way of cutting ``number`` samples into batches that changes a bit of a view of ``size`` px."""
    height, width = int(size * generator.uniform(0.8, 2)) + 1, int(size * generator.uniform(0.8, 2)) + 1
    pixels = torch.from_numpy(generator.integers(0, 256, (number, 3, height, width), dtype=np.uint8))
    sides = np.stack([generator.integers(1 + s // 2, s + 1, number) for s in (height, width)], axis=1)
    image = torch.from_numpy(generator.integers(0, 256, (number, size, size, 3), dtype=np.uint8))
    cuts = [[np.arange(i, min(i + n, number)) for i in range(0, number, n)] for n in (1, 3, number - 1)]
    cuts += [[generator.permutation(number)], [np.arange(0, number, 2)]]

    def made(spec: ViewSpec, rows: Rows) -> tuple[Tensor, Tensor]:
        drawn = None if spec.augment is None else views.draw(spec, 5, 1, rows, 0)
        crop = resident.Crop(spec)
        cropped = crop(drawn, pixels[rows].float(), crop.parameters(drawn, sides[rows]))
        finish = Finish(spec, image.device)
        return finish(drawn, image[rows]), finish(drawn, cropped)

    was = torch.get_num_threads()
    try:
        for augment in (*RECIPES, None):
            spec = ViewSpec(size=size, augment=augment)
            torch.set_num_threads(1)
            whole = made(spec, np.arange(number))
            for threads, batches in itertools.product((1, 2), cuts):
                torch.set_num_threads(threads)
                for rows in batches:
                    for what, want, got in zip(("finish", "crop"), whole, made(spec, rows), strict=True):
                        if not torch.equal(got, want[rows]):
                            off = float((got - want[rows]).abs().max())
                            yield f"{what} {size} px of {height}x{width}, {len(rows)} of {number}, {threads}: {off}"
    finally:
        torch.set_num_threads(was)


if __name__ == "__main__":
    seed = int(sys.argv[1])
    sys.stdout.write(f"{torch.backends.cpu.get_cpu_capability()}\n")
    for side in map(int, sys.argv[2:]):
        for line in differences(side, 3 if side > 100 else 9 if side > 40 else 17, np.random.default_rng([seed, side])):
            sys.stdout.write(line + "\n")
