"""How often a classifier took images of one class for another: counted, and kept in ``confusion.json``."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sslx.console.words import shown
from sslx.errors import DataError, MissingInput
from sslx.machine import files

FILE = "confusion.json"


@dataclass(frozen=True, eq=False)
class Confusion:
    """The confusion matrix of a classifier on the test split.

    classifier: its name, "linear" or "kNN".
    counts: (M, 3) int64, each a class, a predicted class and the number of images; those that never occur are absent,
      so that thousands of classes take no more than their images do.
    """

    classifier: str
    counts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, classifier: str, label: Tensor, predicted: Tensor) -> Self:
        """Count the pairs of labels and predicted classes, (N,) int64 each."""
        pairs, numbers = torch.stack([label, predicted], 1).unique(dim=0, return_counts=True)
        return cls(classifier, torch.cat([pairs, numbers[:, None]], 1).numpy())

    @property
    def num_images(self) -> int:
        return int(self.counts[:, 2].sum())

    @property
    def accuracy(self) -> float:
        """The fraction of images whose predicted class is their own, in [0, 1]."""
        return int(self.counts[self.counts[:, 0] == self.counts[:, 1], 2].sum()) / self.num_images

    def to_json(self, classes: Sequence[str], **facts: Any) -> bytes:
        """Return the contents of ``confusion.json``.  facts: where the images and the features are from."""
        record = {**facts, "classifier": self.classifier, "classes": list(classes), "counts": self.counts.tolist()}
        return (json.dumps(record) + "\n").encode()


@dataclass(frozen=True, eq=False)
class Saved:
    """The contents of a ``confusion.json``: the confusion, the names of the classes, and of which images it is."""

    confusion: Confusion
    classes: tuple[str, ...]
    step: int
    source: str
    split: str


def read(path: Path) -> Saved:
    """Read a ``confusion.json``.  Raises MissingInput without the file, and DataError if it is damaged."""
    try:
        record = files.parse_json(files.read_bytes(path))
        counts = np.array(record["counts"], dtype=np.int64).reshape(-1, 3)
        classes = tuple(map(str, record["classes"]))
        if not len(counts) or counts.min() < 0 or counts[:, 2].min() < 1 or counts[:, :2].max() >= len(classes):
            raise ValueError("it has no counts, or counts of unknown classes")
        confusion = Confusion(str(record["classifier"]), counts)
        return Saved(confusion, classes, int(record["step"]), str(record["source"]), str(record["split"]))
    except FileNotFoundError as error:
        folder = shown(path.parent)
        raise MissingInput(f"expected the predictions in {shown(path)}, got none: run sslx probe {folder}") from error
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        raise DataError(f"{shown(path)} is damaged ({files.reason(error)}): run sslx probe again") from error
