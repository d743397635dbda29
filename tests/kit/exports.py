"""Encoders of any recipe as a checkpoint would give them, and the Python code of an export's README."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sslx import config, encoders
from sslx.data.views import ViewSpec
from sslx.encoders import Recipe
from sslx.trained import Trained

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NARROW = {"layers": [1, 2, 1, 1], "channels": [8, 8, 8, 16]}
VIT = {"patch_size": 4, "depth": 2, "embed_dim": 16, "num_heads": 2, "img_size": 16}
CONVNEXT = {"depths": [1, 1, 2, 1], "dims": [8, 8, 12, 16]}


def recipe(name: str, arguments: dict[str, Any], size: int = 16, **others: Any) -> Recipe:
    return Recipe(name=name, size=size, arguments=arguments, **others)


def trained(recipe: Recipe, view: int, generator: torch.Generator, folder: Path = Path("runs/tiny")) -> Trained:
    """An encoder with random numbers for all weights and statistics, as in a run with the settings of simclr_digits."""
    weights = encoders.rebuild(recipe, view).state_dict()
    for name, value in weights.items():
        if name.endswith("running_var"):
            value += torch.rand(value.shape, generator=generator)
        elif value.is_floating_point():
            value += 0.05 * torch.randn(value.shape, generator=generator)
    return Trained(
        folder=folder,
        checkpoint=folder,
        step=12,
        size=recipe.size,
        view=ViewSpec(size=view, center=0.875, mean=MEAN, std=STD),
        recipe=recipe,
        exported="encoder",
        device=torch.device("cpu"),
        config_text=_settings(),
        weights=weights,
    )


@cache
def _settings() -> str:
    return config.dump(config.load(["simclr_digits"]))


def code(folder: Path, language: str = "python") -> list[str]:
    """The blocks of code in the README of an export."""
    return re.findall(rf"^```{language}\n(.*?)\n```$", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)
