"""Export: a checkpoint's encoder is written in a target's format, loaded back by the target's library, and compared."""

import json
import os
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from sslx import by_name
from sslx.console.words import one_line, shown
from sslx.encoders.weights import preprocessing
from sslx.errors import ConfigError, DataError, StorageError
from sslx.export import card, limits
from sslx.trained import Trained

TARGETS = by_name.Family[object](
    "sslx.export", "--to", shared=("card", "exporter", "limits", "plain_conv", "plain_vit", "preprocessing"), light=()
)
TOLERANCE = 1e-5
"""The largest difference between features of the encoder and of its export, relative to the largest feature.

A target that computes less exactly has a ``TOLERANCE`` of its own.
"""
BATCH_SIZES = (4, 1, 7)
"""The numbers of images for which features are compared."""


def export(trained: Trained, target: str, folder: Path) -> float:
    """Write the encoder to a new folder and return the largest difference of its features, as in ``TOLERANCE``.

    target: the name of a file in ``sslx.export``, or the path of a user's own file.
    The folder appears only after the target's library has loaded the export and computed the same features.
    Raises ConfigError if the folder exists or the target has no such encoder, DataError if the features differ, and
    StorageError if the folder cannot be written.
    """
    module = TARGETS.module(target)
    if os.path.lexists(folder):
        raise ConfigError(f"{shown(folder)} exists: remove it, or name another folder by --output")
    if shown(folder, 10_000) != str(folder):
        raise ConfigError(f"{shown(folder)} is no name that other libraries open: name another folder by --output")
    trained = trained if trained.device.type == "cpu" else trained.to("cpu")  # where fp32 is not TF32
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            written = Path(temporary) / folder.name
            written.mkdir()
            difference = _write(trained, module, by_name.label(target), written)
            facts = json.dumps(card.facts(trained, module), indent=1)
            (written / preprocessing.SSLX).write_text(f"{facts}\n", encoding="utf-8")
            text = card.text(trained, module, folder)
            (written / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")
            os.replace(written, folder)
    except OSError as error:
        raise StorageError(f"cannot write {shown(folder)}: {one_line(error)}") from error
    return difference


def default_folder(trained: Trained, target: str) -> Path:
    """Return the folder for an export of a run for which the user names none.

    Raises ConfigError for weights that sslx did not train.
    """
    return trained.folder_for_results() / "export" / by_name.label(target)


def usage(trained: Trained, target: str, folder: Path) -> str:
    """Return the Python code that loads an export and computes ``features`` of ``images``."""
    return TARGETS.module(target).usage(trained, folder)


@torch.no_grad()
def _write(trained: Trained, module: ModuleType, name: str, folder: Path) -> float:
    """Write the target's files and return the difference between the encoder and what the target's library loads."""
    module.write(trained, folder)
    encoder, channels, sizes = trained.encoder, trained.encoder.recipe.channels, [trained.view.size]
    takes_other_sizes = getattr(module, "takes_other_sizes", lambda _: False)
    if takes_other_sizes(encoder) and (size := limits.other_size(encoder, trained.view.size)):
        sizes.append(size)
    with torch.random.fork_rng(devices=[]):
        loaded: nn.Module = module.read(trained, folder)
    loaded.eval()
    generator, differences = torch.Generator(), list[float]()
    for size in sizes:
        for num_images in BATCH_SIZES:
            images = torch.randn(num_images, channels, size, size, generator=generator)
            expected = encoder(images)
            differences.append(((loaded(images) - expected).abs().max() / expected.abs().max()).item())
    tolerance: float = getattr(module, "TOLERANCE", TOLERANCE)
    if wrong := [difference for difference in differences if not difference <= tolerance]:
        raise DataError(
            f"{name} loads the exported encoder, but its features differ by {wrong[0]:.1e} of the largest one "
            f"(allowed: {tolerance:g}): nothing was written; please report it with the run's config.json"
        )
    return max(differences)
