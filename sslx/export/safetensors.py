"""A file of tensors by timm's names, with the encoder's recipe and view in its metadata: any encoder of sslx."""

import json
from pathlib import Path

import safetensors
import safetensors.torch
from torch import nn

from sslx import encoders
from sslx.encoders import Recipe
from sslx.export.card import metadata, quoted
from sslx.trained import Trained

FILE = "model.safetensors"


def write(trained: Trained, folder: Path) -> None:
    """Write ``model.safetensors``, whose metadata has the recipe and the view as JSON."""
    tensors = {name: value.clone().contiguous() for name, value in trained.encoder.trunk.state_dict().items()}
    (folder / FILE).write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt", **metadata(trained)}))


def takes_other_sizes(_: encoders.Encoder) -> bool:
    """Return whether the export takes images of the sizes that the encoder takes."""
    return True


def read(_: Trained, folder: Path) -> nn.Module:
    """Return the encoder that is built from the file alone: (B, C, H, W) -> (B, dim)."""
    with safetensors.safe_open(folder / FILE, framework="pt") as file:
        recipe = Recipe(**json.loads(file.metadata()["recipe"]))
    encoder = encoders.rebuild(recipe)
    encoder.trunk.load_state_dict(safetensors.torch.load_file(folder / FILE), strict=True)
    return encoder


def usage(trained: Trained, folder: Path) -> str:
    """Return the Python code that loads the encoder and computes the features of images: with timm, if that has it."""
    recipe, file = trained.encoder.recipe, quoted(folder / FILE)
    if recipe.stem == "imagenet" and recipe.norm == "batch":
        arguments = {"num_classes": 0, "in_chans": recipe.channels, **recipe.arguments}
        values = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        lines = [
            "import safetensors.torch, timm",
            f"model = timm.create_model({recipe.name!r}, {values}).eval()",
            f"model.load_state_dict(safetensors.torch.load_file({file}))",
        ]
    else:
        lines = [
            "import json, safetensors.torch, sslx.encoders",
            f'metadata = safetensors.safe_open({file}, "pt").metadata()',
            'model = sslx.encoders.rebuild(sslx.encoders.Recipe(**json.loads(metadata["recipe"]))).eval()',
            f"model.trunk.load_state_dict(safetensors.torch.load_file({file}))",
        ]
    return "\n".join([*lines, "features = model(images)"])
