"""Pretraining from a program: ``sslx.pretrain``.

Example::

    import sslx

    trained = sslx.pretrain("simclr_digits", steps=100)
    trained = sslx.pretrain(dataset=my_dataset, name="mine", epochs=50, encoder={"name": "resnet18"})
"""

import dataclasses
import json
import threading
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from sslx import config
from sslx.config import PretrainConfig, flags
from sslx.console.display import Terminal
from sslx.data.sources import dataset as datasets
from sslx.errors import ConfigError, UserError
from sslx.machine import environment, interrupts, limits
from sslx.runs import records
from sslx.train import launch
from sslx.train.pretrain import Position
from sslx.train.signals import StopSignals
from sslx.trained import Trained, load

Recipe = str | PathLike[str] | PretrainConfig


def pretrain(recipe: Recipe | Sequence[Recipe] = (), *, dataset: Any = None, **overrides: Any) -> Trained:
    """Do what ``sslx pretrain`` does, with the same output and files, and return the trained encoder.

    recipe: the name or path of a recipe, a config, or several of them, of which later ones override earlier ones.
    dataset: train on this map-style Dataset (``torch.utils.data.Dataset`` or anything with ``__len__`` and
      ``__getitem__``) of pictures, of tuples that start with a picture, or of dicts with an "image".  Each item must be
      the same picture whenever it is read; the method augments it.  ``dataset.targets``, if there, are the classes,
      which only probes use.
    overrides: the options of ``sslx pretrain --help-all``: ``batch_size=256``, ``optim={"lr": 0.1}`` or
      ``**{"optim.lr": 0.1}``.

    It works in a notebook, and in a script under torchrun, which starts a process for each GPU; without torchrun it
    starts them itself, as the command does, unless there is a ``dataset``, which other processes do not have.
    Ctrl-C saves a checkpoint and raises KeyboardInterrupt; the same call with ``resume="auto"`` goes on.

    Raises what the command ends with: ConfigError, DataError, MissingInput and others of ``sslx.errors``.

    Example::

        from torchvision.datasets import CIFAR10

        trained = sslx.pretrain("simclr_cifar10_cpu", dataset=CIFAR10("data"), epochs=10)
        vectors = trained.embed(CIFAR10("data", train=False))
    """
    environment.check()
    argv = _argv(recipe, overrides)
    if dataset is not None:
        argv += ["--source.name", "dataset", *_one_process(argv)]
    datasets.use(dataset)
    try:
        settings = config.load(argv, quiet=environment.launched_rank() not in (None, 0))
        position = Position(terminal=Terminal(enabled=environment.launched_rank() in (None, 0)), goes_on=True)
        limits.raise_file_limit()
        in_main_thread = threading.current_thread() is threading.main_thread()
        # Only the main thread may handle signals; elsewhere a run ends with its program.
        code = launch.main(settings, argv, None if in_main_thread else StopSignals(), position)
    except SystemExit as error:  # of the parser of flags, which has said what is wrong
        raise ConfigError("wrong options for sslx.pretrain: see above") from error
    finally:
        datasets.use(None)
    folder = settings.runs / settings.name
    if code:
        raise _error(code, folder, position)
    return load(folder)


def _argv(recipe: Recipe | Sequence[Recipe], overrides: dict[str, Any]) -> list[str]:
    """Return the arguments of the command."""
    recipes = [recipe] if isinstance(recipe, str | PathLike | PretrainConfig) else list(recipe)
    names, from_configs = list[str](), list[str]()
    for one in recipes:
        if isinstance(one, PretrainConfig):
            tree = json.loads(config.dump(one))
            del tree["schema"]
            from_configs += flags.of(tree, Path("the config"))
        else:
            names.append(fspath(one))
    return [*names, *from_configs, *flags.of(_plain(overrides), Path("the call of sslx.pretrain"))]


def _plain(value: Any) -> Any:
    """Return a value with lists, dicts and texts in place of tuples, configs and paths, as in a file of settings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key).replace("_", "-"): _plain(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return fspath(value) if isinstance(value, PathLike) else value


def _one_process(argv: Sequence[str]) -> list[str]:
    """Return the flag that keeps a run in this process.  Raises ConfigError if it asks for more."""
    if environment.launched_rank() is not None:
        return []
    if flags.last(list(argv), "ranks", "1") != "1":
        raise ConfigError(
            "other processes do not have this dataset: start the script by torchrun --nproc-per-node N instead of "
            "ranks=N"
        )
    return ["--ranks", "1"]


def _error(code: int, folder: Path, position: Position) -> BaseException:
    """Return the error to raise for an exit code of the command."""
    if position.error is not None:
        return position.error
    if code == interrupts.exit_code(2):
        return KeyboardInterrupt()
    status = records.read_status(folder) if folder.is_dir() else None
    kinds = {kind.exit_code: kind for kind in UserError.__subclasses__()}
    reason = status.reason if status and status.reason else "see its output"
    return kinds.get(code, RuntimeError)(f"the run ended with exit code {code}: {reason}")
