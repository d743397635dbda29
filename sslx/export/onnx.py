"""One file for ONNX runtimes: ``images`` in batches of any size -> ``features``."""

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslx.console.words import one_line
from sslx.encoders import Encoder
from sslx.errors import ConfigError
from sslx.export import limits
from sslx.export.card import metadata, quoted
from sslx.machine import onednn
from sslx.trained import Trained

FILE = "model.onnx"
TOLERANCE = 1e-4
"""ONNX runtimes sum in another order, and merge layers, which torch does not."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def write(trained: Trained, folder: Path) -> None:
    """Write ``model.onnx``, whose metadata has the recipe and the view as JSON.

    Raises ConfigError for an encoder with an operator that ONNX does not have, or without the packages.
    """
    limits.require("onnx", *PACKAGES)
    encoder = trained.encoder
    size, channels = trained.view.size, encoder.recipe.channels
    axes = {0: "batch"}
    if other_size := limits.other_size(encoder, size):
        axes |= {2: "height", 3: "width"}
        size = other_size  # the larger one, in which no stage has a single pixel, which torch would take for a constant
    trunk = copy.deepcopy(encoder.trunk).eval()
    onednn.remove_workarounds(trunk)
    try:
        program: Any = torch.onnx.export(
            trunk,
            (torch.randn(2, channels, size, size),),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=(axes,),
        )
    except Exception as error:  # torch's exporter and onnxscript raise exceptions of many types
        reason = one_line(error.__cause__ or error, 200)
        raise ConfigError(
            f"{encoder.recipe.name} cannot be written as ONNX, which may not have all of its operators "
            f"({type(error).__name__}: {reason}): use --to safetensors"
        ) from error
    program.model.metadata_props.update(metadata(trained))
    program.save(folder / FILE)


def takes_other_sizes(_: Encoder) -> bool:
    """Return whether the export takes images of the sizes that the encoder takes."""
    return True


class _Session(nn.Module):
    """An ONNX file in onnxruntime."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        onnxruntime = import_module("onnxruntime")  # which only this target needs
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, dim) of images (B, C, H, W)."""
        return torch.from_numpy(self.session.run(["features"], {"images": images.numpy()})[0])


def read(_: Trained, folder: Path) -> nn.Module:
    """Return the model in onnxruntime: (B, C, H, W) -> (B, dim)."""
    return _Session(folder / FILE)


def usage(_: Trained, folder: Path) -> str:
    """Return the Python code that loads the model and computes the features of images."""
    return "\n".join(
        [
            "import onnxruntime",
            f"session = onnxruntime.InferenceSession({quoted(folder / FILE)})",
            '(features,) = session.run(["features"], {"images": images.numpy()})',
        ]
    )
