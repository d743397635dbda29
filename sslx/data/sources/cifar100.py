"""CIFAR-100: 60,000 photographs of 32 px in a hundred classes (Krizhevsky, 2009)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sslx.data.sources.config import Split
from sslx.data.sources.torchvision_sets import TorchvisionConfig


@dataclass(frozen=True, kw_only=True)
class Config(TorchvisionConfig):
    """The location of CIFAR-100."""

    name: Literal["cifar100"] = "cifar100"

    def dataset(self, root: Path, split: Split) -> Any:
        from torchvision import datasets

        return datasets.CIFAR100(root, train=split != "test", download=self.download)
