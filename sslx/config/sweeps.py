"""Sweeps: many runs that one file with lists of values describes."""

import dataclasses
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path

from sslx.config import PretrainConfig, flags, load
from sslx.console.words import shown
from sslx.errors import ConfigError, MissingInput

MAX_RUNS = 2_000
"""Maximum number of runs of a sweep.  All are checked before any is submitted, which takes 0.1 s per run."""


def runs(path: Path, argv: Sequence[str], *, gpu: bool | None = None) -> list[PretrainConfig]:
    """Return the configs of a sweep's runs, each named after its changes.

    path: a .toml file whose table ``grid`` has a list of values for each flag, without its dashes, of which all
      combinations are run, and whose tables ``run`` have one value for each flag.
    argv: arguments that all runs have in common.
    """
    if not os.path.exists(path):
        raise MissingInput(f"sweep {shown(path)} does not exist")
    tree = flags.read(path)
    grid, tables = tree.pop("grid", {}), tree.pop("run", [{}])
    lists = isinstance(grid, dict) and all(isinstance(values, list) and values for _, values in flags.leaves(grid))
    if tree or not lists or not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(
            f"{shown(path)}: expected a table [grid] of lists that hold something, tables [[run]], nothing else"
        )
    axes = dict(flags.leaves(grid))
    num_runs = len(tables) * math.prod(map(len, axes.values()))
    if num_runs > MAX_RUNS:
        raise ConfigError(f"{shown(path)}: {num_runs:,} runs are more than the {MAX_RUNS:,} of one array: cut it")
    found: list[PretrainConfig] = []
    for table in tables:
        for values in itertools.product(*axes.values()):
            changes = dict(flags.leaves(table)) | dict(zip(axes, values, strict=True))
            run = load([*argv, *flags.of(changes, path)], gpu=gpu)
            found.append(dataclasses.replace(run, name=flags.name_of_sweep(run.name, changes)))
    if not found:
        raise ConfigError(f"{shown(path)}: no run in it")
    if len({run.name for run in found}) < len(found):
        raise ConfigError(f"{shown(path)}: two runs change the same: they would share a folder")
    return found
