"""The base of the sources that read torchvision's data sets, in torchvision's own layout under a folder."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sslx.console import activity
from sslx.console.words import shown
from sslx.data.facts import Facts
from sslx.data.sources.config import SourceConfig, Split
from sslx.data.sources.listing import has_images
from sslx.errors import MissingInput
from sslx.machine.files import expanded

if TYPE_CHECKING:
    from sslx.data.sources.base import Context, Pixels


@dataclass(frozen=True, kw_only=True)
class TorchvisionConfig(SourceConfig):
    """The location of a data set.  size: the suitable side of its views, in pixels."""

    root: Path | None = None
    """Folder of the downloaded data set.  Default: ~/.cache/sslx."""
    download: bool = False
    """Download the data set if it is missing."""

    is_own: ClassVar[bool] = False
    size: ClassVar[int] = 32

    def dataset(self, root: Path, split: Split) -> Any:
        """Return torchvision's data set, with the attributes ``data``, ``targets`` and ``classes``."""
        raise NotImplementedError

    def build(self, split: Split, context: "Context") -> "Pixels":
        del context
        import numpy as np  # imported late, because options must not import numpy

        from sslx.data.sources.base import Pixels, gray_as_rgb

        root = expanded(self.root or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "sslx"))
        with activity.doing(f"{'downloading' if self.download else 'reading'} {self.name}"):
            dataset = self._open(root, split)
        pixels = np.asarray(dataset.data)
        if pixels.ndim == 3:  # gray
            pixels = gray_as_rgb(pixels)
        labels = np.asarray(dataset.targets, dtype=np.int64)
        if (labels < 0).any():
            facts = Facts(num_samples=len(pixels), size=self.size)
        else:
            classes = tuple(dataset.classes)
            facts = Facts(num_samples=len(pixels), size=self.size, labels=labels, classes=classes)
        return Pixels(name=self.name, facts=facts, pixels=pixels)

    def _open(self, root: Path, split: Split) -> Any:
        try:
            return self.dataset(root, split)
        except (RuntimeError, OSError) as error:
            if self.download:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise MissingInput(f"{self.name} could not be downloaded to {shown(root)}: {reason}") from error
            hint = ", or --source.name folder to read the images there" if has_images(root) else ""
            raise MissingInput(
                f"{self.name} not found under {shown(root)}: give its folder with --source.root, or --source.download "
                f"to fetch it{hint}"
            ) from error
