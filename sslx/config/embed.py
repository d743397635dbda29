"""The configuration of ``sslx embed``, ``neighbors`` and ``plot``: an encoder and the images to apply it to."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from sslx.config import choices
from sslx.config.parser import MISSING, Positional, arg
from sslx.config.pretrain import PretrainConfig, of_images
from sslx.data.config import Config as DataConfig
from sslx.data.sources.config import SourceConfig, Split
from sslx.errors import ConfigError
from sslx.runs.config import ResultsConfig


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Write the features of many images to a file.

    Each image has a row with its index, path, label and vector.

    The same command continues if it was stopped.

    Under torchrun, all ranks share the work.
    """

    checkpoint: Positional[Path]
    """A run folder, a checkpoint directory in it, or weights of another library."""
    output: Annotated[Path, arg(aliases=["-o"])] = MISSING
    """File to write: .parquet; or .npy or .safetensors, with a .csv of paths and labels beside it."""
    part: str | None = None
    """Place of the encoder in a file of another library that holds several, such as teacher."""
    source: SourceConfig = field(default_factory=lambda: SourceConfig(name=choices.SOURCE))
    """Images to embed.  Default: the run's."""
    split: Split = "pretrain"
    """Images of the source to take.  pretrain: those that a run trains on."""
    data: DataConfig = field(default_factory=DataConfig)
    """How images are read.  Default: as in the run."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Type of the numbers in the file."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision in which the encoder computes.  auto: bf16 on a GPU that supports it, else fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute features on."""
    batch_size: int = 256
    """Images per batch on each rank."""

    def __post_init__(self) -> None:
        _check_batch_size(self.batch_size)


@dataclass(frozen=True, kw_only=True)
class NeighborsConfig:
    """Find the images whose features are most similar to those of given ones.

    Their paths and similarities are printed, and a picture of them is written.
    """

    checkpoint: Positional[Path]
    """A run folder, a checkpoint directory in it, or weights of another library."""
    images: Positional[tuple[Path, ...]] = ()
    """Image files to find neighbors of."""
    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    """Picture to write, a .png or .svg.  Default: RUN/nearest.png."""
    part: str | None = None
    """Place of the encoder in a file of another library that holds several, such as teacher."""
    num_neighbors: int = 6
    """Number of neighbors of each image."""
    source: SourceConfig = field(default_factory=lambda: SourceConfig(name=choices.SOURCE))
    """Images to search.  Default: the run's."""
    split: Split = "pretrain"
    """Images of the source to search.  pretrain: those that a run trains on."""
    data: DataConfig = field(default_factory=DataConfig)
    """How images are read.  Default: as in the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute features on."""
    batch_size: int = 256
    """Images per batch on each rank."""

    def __post_init__(self) -> None:
        _check_batch_size(self.batch_size)
        if self.num_neighbors < 1:
            raise ConfigError(f"--num-neighbors must be at least 1, not {self.num_neighbors}")


@dataclass(frozen=True, kw_only=True)
class PlotConfig(ResultsConfig):
    """Draw a run's loss, a map of its features, neighbors and views, as PNG files."""

    checkpoint: Positional[Path]
    """A run folder, or a checkpoint directory in it."""
    source: SourceConfig = field(default_factory=lambda: SourceConfig(name=choices.SOURCE))
    """Images to draw.  Default: the run's."""
    data: DataConfig = field(default_factory=DataConfig)
    """How images are read.  Default: as in the run."""
    num_points: int = 2000
    """Maximum number of images on the map, from the test split or, if there is none, from held-out training images."""
    seed: int = 0
    """Random seed of the map and of the choice of images."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute features on."""


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, not {batch_size}")


def load_embed(argv: Sequence[str], run: PretrainConfig | None = None, *, quiet: bool = False) -> EmbedConfig:
    """Return the config of ``sslx embed CHECKPOINT -o FILE [--flags]``; ``run`` as for ``config.load_probe``."""
    return of_images(EmbedConfig, "sslx embed", argv, run, quiet)


def load_neighbors(argv: Sequence[str], run: PretrainConfig | None = None, *, quiet: bool = False) -> NeighborsConfig:
    """Return the config of ``sslx neighbors CHECKPOINT IMAGE... [--flags]``; ``run`` as for ``config.load_probe``."""
    config = of_images(NeighborsConfig, "sslx neighbors", argv, run, quiet)
    if not config.images:
        raise ConfigError("sslx neighbors needs images to find neighbors of: sslx neighbors RUN cat.jpg dog.jpg")
    return config


def load_plot(argv: Sequence[str], run: PretrainConfig | None = None, *, quiet: bool = False) -> PlotConfig:
    """Return the config of ``sslx plot CHECKPOINT [--flags]``; ``run`` as for ``config.load_probe``."""
    return of_images(PlotConfig, "sslx plot", argv, run, quiet)
