"""Export: a checkpoint's encoder is written in a target's format, loaded back by the target's library, and compared."""

import os
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from sslx import by_name
from sslx.console.words import one_line, shown
from sslx.errors import ConfigError, DataError, StorageError
from sslx.trained import Trained

TARGETS = by_name.Family[object]("sslx.export", "--to", shared=("exporter",), light=())
TOLERANCE = 1e-5
"""The largest difference between features of the encoder and of its export, relative to the largest feature."""


def export(trained: Trained, target: str, folder: Path) -> float:
    """Write the encoder to a new folder and return the largest difference of its features, as in ``TOLERANCE``.

    target: the name of a file in ``sslx.export``, or the path of a user's own file.
    The folder appears only after the target's library has loaded the export and computed the same features.
    Raises ConfigError if the folder exists or the target has no such encoder, DataError if the features differ, and
    StorageError if the folder cannot be written.
    """
    module = TARGETS.module(target)
    if folder.exists():
        raise ConfigError(f"{shown(folder)} exists: remove it, or name another folder by --output")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            written = Path(temporary) / folder.name
            written.mkdir()
            difference = _write(trained, module, by_name.label(target), written)
            (written / "README.md").write_text(_card(trained, module, folder), encoding="utf-8")
            os.replace(written, folder)
    except OSError as error:
        raise StorageError(f"cannot write {shown(folder)}: {one_line(error)}") from error
    return difference


def default_folder(trained: Trained, target: str) -> Path:
    """Return the folder for an export of a run for which the user names none."""
    return trained.folder / "export" / by_name.label(target)


@torch.no_grad()
def _write(trained: Trained, module: ModuleType, name: str, folder: Path) -> float:
    """Write the target's files and return the difference between the encoder and what the target's library loads."""
    module.write(trained, folder)
    encoder, channels = trained.encoder, trained.encoder.recipe.channels
    with torch.random.fork_rng(devices=[]):
        loaded: nn.Module = module.read(folder)
        images = torch.randn(4, channels, trained.view.size, trained.view.size, generator=torch.Generator())
    expected = encoder(images.to(trained.device)).cpu()
    difference = ((loaded.eval()(images) - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:
        raise DataError(
            f"{name} loads the exported encoder, but its features differ by {difference:.1e} of the largest one "
            f"(allowed: {TOLERANCE:g}): nothing was written; please report it with the run's config.json"
        )
    return difference


def _card(trained: Trained, module: ModuleType, folder: Path) -> str:
    """Return the README of an export: what the encoder is, how it was trained, and how it is loaded."""
    settings, view, recipe = trained.settings, trained.view, trained.encoder.recipe
    square = f"the central {view.center:.0%} of the shorter side, resized to {view.size} px"
    return f"""# {shown(trained.folder.name)}

An encoder pretrained without labels by [sslx](https://pypi.org/project/sslx): {recipe.name}, {trained.dim} features.

```python
{module.usage(folder)}
```

| | |
| --- | --- |
| method | {by_name.label(settings.method.name)}, of which this is `{trained.exported}` |
| images | {by_name.label(settings.source.name)}, {trained.size} px |
| steps | {trained.step:,} of batch size {settings.batch_size:,} |
| preprocessing | {square}, mean {view.mean}, std {view.std} |
"""
