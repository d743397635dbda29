"""Ten classes of noisy 64x64 gratings that differ in orientation and color.  For tests, not science."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from sslx import rng
from sslx.data.facts import Facts
from sslx.data.sources.base import Context, Pixels
from sslx.data.sources.config import SourceConfig, Split
from sslx.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config(SourceConfig):
    """Computed images."""

    name: Literal["synthetic"] = "synthetic"
    num_samples: int = 4096
    """Number of images."""

    is_own: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ConfigError(f"--source.num-samples must be at least 1, not {self.num_samples}")

    def build(self, split: Split, context: "Context") -> "Pixels":
        del context
        num_samples = self.num_samples
        labels = np.arange(num_samples, dtype=np.int64) % 10
        u = rng.uniform(0, f"synthetic {split}", np.arange(num_samples), num=2)
        y, x = np.mgrid[0:64, 0:64] / 64
        angle = (labels * np.pi / 10)[:, None, None]
        across = x * np.cos(angle) + y * np.sin(angle)
        wave = np.sin(2 * np.pi * (3 + 3 * u[:, :1, None]) * across + 6.3 * u[:, 1:, None])
        tint = 0.5 + 0.5 * np.cos(2 * np.pi * (labels[:, None] / 10 + np.arange(3) / 3))
        noise = rng.words(0, f"synthetic noise {split}", np.arange(min(num_samples, 64)), num=64 * 64 * 3) % 64
        pixels = np.empty((num_samples, 64, 64, 3), dtype=np.uint8)
        for i in range(num_samples):  # one at a time, because float intermediates of all images would need gigabytes
            pixels[i] = (96 + 64 * wave[i])[..., None] * tint[i] + noise[i % 64].reshape(64, 64, 3)
        facts = Facts(num_samples=num_samples, size=64, labels=labels, classes=tuple(str(i) for i in range(10)))
        return Pixels(
            name="synthetic", facts=facts, pixels=pixels, is_exact=False
        )  # sines may round differently on another CPU
