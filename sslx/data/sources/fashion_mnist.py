"""Fashion-MNIST: 70,000 gray pictures of clothes, 28 px, in ten classes (arXiv 1708.07747)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sslx.data.sources.config import Split
from sslx.data.sources.torchvision_sets import TorchvisionConfig


@dataclass(frozen=True, kw_only=True)
class Config(TorchvisionConfig):
    """The location of Fashion-MNIST."""

    name: Literal["fashion_mnist"] = "fashion_mnist"

    def dataset(self, root: Path, split: Split) -> Any:
        from torchvision import datasets

        return datasets.FashionMNIST(root, train=split != "test", download=self.download)
