"""scikit-learn's 1,797 real 8x8 digits (UCI optdigits), with every fifth image of each class held out."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from sslx.data.facts import Facts
from sslx.data.sources.base import Context, Pixels, gray_as_rgb
from sslx.data.sources.config import SourceConfig, Split


@dataclass(frozen=True, kw_only=True)
class Config(SourceConfig):
    """The digits that come with scikit-learn."""

    name: Literal["digits"] = "digits"

    is_own: ClassVar[bool] = False
    suited: ClassVar[dict[str, Any]] = {
        "augment.flip": 0.0,
        "augment.saturation": 0.0,
        "augment.hue": 0.0,
        "augment.gray": 0.0,
    }
    suited_why: ClassVar[str] = "digits: no flips, no colors"
    score_note: ClassVar[str] = (
        "Raw pixels do well here because the digits have 8x8 pixels, are centered and have the same size: two images "
        "of a digit overlap pixel by pixel. Photographs do not (README, CIFAR-10)."
    )

    def build(self, split: Split, context: "Context") -> "Pixels":
        del context
        images, labels = _read()
        place_in_class = np.zeros(len(labels), dtype=np.int64)
        for digit in range(10):
            members = labels == digit
            place_in_class[members] = np.arange(members.sum())
        chosen = (place_in_class % 5 == 4) == (split == "test")
        gray = np.rint(images[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        pixels = gray_as_rgb(gray)
        names = tuple(str(digit) for digit in range(10))
        facts = Facts(num_samples=len(pixels), size=32, labels=labels[chosen].astype(np.int64), classes=names)
        return Pixels(name="digits", facts=facts, pixels=pixels)


def _read() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return the images, (1797, 64) in [0, 16], and their labels.

    The file is read without importing scikit-learn, which takes as long as importing torch does.
    """
    package = find_spec("sklearn")
    for folder in (package.submodule_search_locations or ()) if package else ():
        if (path := Path(folder, "datasets", "data", "digits.csv.gz")).is_file():
            table = np.loadtxt(path, delimiter=",")
            return table[:, :-1], table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits  # an installation that is arranged in another way

    table: Any = load_digits(return_X_y=True)
    return table
