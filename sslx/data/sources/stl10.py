"""STL-10: 13,000 photographs of 96 px in ten classes, and 100,000 unlabeled ones (Coates et al., 2011)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from sslx.data.sources.config import Split
from sslx.data.sources.torchvision_sets import TorchvisionConfig


@dataclass(frozen=True, kw_only=True)
class Config(TorchvisionConfig):
    """The location of STL-10."""

    name: Literal["stl10"] = "stl10"

    has_unlabeled: ClassVar[bool] = True
    size: ClassVar[int] = 96

    def dataset(self, root: Path, split: Split) -> Any:
        import numpy as np  # imported late, because options must not import numpy
        from torchvision import datasets

        part = "train+unlabeled" if split == "pretrain" else split
        dataset: Any = datasets.STL10(str(root), split=part, download=self.download)
        dataset.data = np.ascontiguousarray(dataset.data.transpose(0, 2, 3, 1))
        dataset.targets = dataset.labels
        return dataset
