"""A folder that timm loads: ``timm.create_model("local-dir:FOLDER", pretrained=True)``."""

import json
from pathlib import Path

from torch import nn

from sslx.encoders import Encoder
from sslx.export import limits
from sslx.export.card import quoted
from sslx.export.preprocessing import of_timm
from sslx.trained import Trained


def write(trained: Trained, folder: Path) -> None:
    """Write ``pytorch_model.bin`` and ``config.json``, which has the architecture and how timm prepares images.

    timm 1.0.20 does not read safetensors from a folder, so the weights are plain tensors, saved by torch.

    Raises ConfigError for an encoder that is not one of timm's: one with another stem or with group norm.
    """
    encoder, view = trained.encoder, trained.view
    recipe = encoder.recipe
    limits.check_stem_and_norm("timm", encoder)
    config = {
        "architecture": recipe.name,
        "num_classes": 0,
        "num_features": encoder.dim,
        "model_args": {**recipe.arguments, "in_chans": recipe.channels},
        "pretrained_cfg": {
            "input_size": [recipe.channels, view.size, view.size],
            **of_timm(view),
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {name: value.cpu().contiguous() for name, value in encoder.trunk.state_dict().items()}
    limits.save(weights, folder / "pytorch_model.bin")


def takes_other_sizes(_: Encoder) -> bool:
    """Return whether the export takes images of the sizes that the encoder takes."""
    return True


def read(_: Trained, folder: Path) -> nn.Module:
    """Return the model as a user of timm gets it: (B, C, H, W) -> (B, dim)."""
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def usage(_: Trained, folder: Path) -> str:
    """Return the Python code that loads the model and computes the features of images."""
    model = f"timm.create_model({quoted(f'local-dir:{folder}')}, pretrained=True)"
    return f"import timm\nmodel = {model}.eval()\nfeatures = model(images)"
