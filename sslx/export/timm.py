"""A folder that timm loads: ``timm.create_model("local-dir:FOLDER", pretrained=True)``."""

import json
from pathlib import Path

import torch
from torch import nn

from sslx.errors import ConfigError
from sslx.trained import Trained


def write(trained: Trained, folder: Path) -> None:
    """Write ``pytorch_model.bin`` and ``config.json``, which has the architecture and how timm prepares images.

    timm 1.0.20 does not read safetensors from a folder, so the weights are plain tensors, saved by torch.

    Raises ConfigError for an encoder that is not one of timm's: one with another stem or with group norm.
    """
    encoder, view = trained.encoder, trained.view
    recipe = encoder.recipe
    change = f"a {recipe.stem} stem" if recipe.stem != "imagenet" else "group norm" if recipe.norm == "group" else ""
    if change:
        raise ConfigError(
            f"timm has no {recipe.name} with {change}, so it cannot load this encoder: use sslx.load, or pretrain with "
            "--encoder.stem imagenet and batch norm"
        )
    config = {
        "architecture": recipe.name,
        "num_classes": 0,
        "num_features": encoder.dim,
        "model_args": {**recipe.arguments, "in_chans": recipe.channels},
        "pretrained_cfg": {
            "input_size": [recipe.channels, view.size, view.size],
            "mean": view.mean,
            "std": view.std,
            "crop_pct": view.center,
            "crop_mode": "center",
            "interpolation": "bilinear",
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {name: value.cpu().contiguous() for name, value in encoder.trunk.state_dict().items()}
    torch.save(weights, folder / "pytorch_model.bin")


def read(folder: Path) -> nn.Module:
    """Return the model as a user of timm gets it: (B, C, H, W) -> (B, dim)."""
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def usage(folder: Path) -> str:
    """Return the Python line that loads the folder."""
    return f'timm.create_model("local-dir:{folder}", pretrained=True)'
