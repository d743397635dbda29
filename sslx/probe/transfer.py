"""Further labeled images for ``sslx probe``: how well an encoder does on what it was not trained on."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from sslx.config import ProbeConfig, choices
from sslx.console.words import shown
from sslx.data import sources
from sslx.data.sources import SourceConfig
from sslx.errors import ConfigError, UserError
from sslx.machine import files
from sslx.probe import images
from sslx.probe.images import Splits
from sslx.trained import Trained


@dataclass(frozen=True)
class Task:
    """Images that representations are scored on, with labels.

    options: the probe's, with the source of these images, and without the scores that need no labels.
    """

    options: ProbeConfig
    splits: Splits


def tasks(trained: Trained, options: ProbeConfig, say: Callable[[str], None]) -> list[Task]:
    """Return what ``--transfer`` names, and describe each to ``say``.

    Raises ConfigError for what is no source, has no labels, or cannot be read.
    """
    if len(set(options.transfer)) < len(options.transfer):
        raise ConfigError(f"--transfer: expected each place once, got {shown(' '.join(options.transfer))}")
    found = list[Task]()
    label_free = replace(options.probe, label_free=False)
    for place in options.transfer:
        task_options = replace(options, source=source_of(place), probe=label_free)
        try:
            splits = images.splits(trained, task_options, say)
        except UserError as error:
            raise type(error)(f"--transfer {shown(place)}: {error}") from error
        for source in (splits.all_train, splits.test):
            if reason := images.unlearnable_reason(source):
                raise ConfigError(
                    f"--transfer {shown(place)}: expected images with labels of two classes, but {reason}"
                )
        found.append(Task(task_options, splits))
    return found


def source_of(place: str) -> SourceConfig:
    """Return the source that a place names: a folder, the name of a source, or NAME=FOLDER.

    Raises ConfigError if it is none of these.
    """
    name, _, root = place.partition("=")
    if Path(place).expanduser().is_dir():
        name, root = "folder", place
    if name not in sources.available():
        names = ", ".join(sources.available())
        raise ConfigError(f"--transfer: expected a folder, or NAME or NAME=FOLDER of {names}; got {shown(place)}")
    config = choices.complete_source(choices.source(name))
    if not root:
        return config
    if "root" not in {field.name for field in dataclasses.fields(config)}:
        raise ConfigError(f"--transfer {shown(place)}: {name} has no folder to give: use --transfer {name}")
    return replace(config, **{"root": files.expanded(root)})
