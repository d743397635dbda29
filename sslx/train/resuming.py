"""Whether a run goes on: what its saved config and the given one may differ in, and what replaces a damaged one."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sslx.config import DamagedConfig, PretrainConfig, dump, flags, loads
from sslx.console.words import shown
from sslx.errors import ConfigError
from sslx.machine import files

# A resumed run may differ in these: where and how it runs, not what it computes.
MAY_DIFFER = ("runs", "name", "resume", "ranks", "device", "compile", "deterministic", "source.root",
              "source.test_root", "source.splits", "source.download", "data.threads", "data.backend", "data.max_bad",
              "on_nonfinite", "skip_steps", "online", "health", "checkpoint", "log")  # fmt: skip


def differences(ours: PretrainConfig, theirs: PretrainConfig, ignore: Sequence[str] = ()) -> list[str]:
    """``flag: theirs -> ours`` for every field that differs, in flag notation; ``ignore`` names prefixes."""
    a, b = leaves(ours), leaves(theirs)
    unset = {*ours.unset, *theirs.unset}
    changed = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key) and key not in unset)
    kept = [key for key in changed if not any(key == i or key.startswith(i + ".") for i in ignore)]
    return [f"--{key.replace('_', '-')} {b.get(key)} -> {a.get(key)}" for key in kept]


def leaves(settings: PretrainConfig) -> dict[str, Any]:
    """Every field by its dotted name, as JSON holds it."""
    return dict(flags.leaves(json.loads(dump(settings))))


def check_resumable(settings: PretrainConfig, folder: Path) -> str:
    """Raise ConfigError where the folder holds a run that these settings do not go on with.

    Returns a note where its config.json is damaged, and was compared as the newest checkpoint holds it; else "".
    """
    if not os.path.exists(folder / "config.json"):
        return ""
    if settings.resume != "auto":
        raise ConfigError(
            f"run {shown(folder)} exists: go on with sslx resume {shown(folder)}, or start another one with --name NAME"
        )
    saved, note = _saved(folder)
    changed = [shown(change) for change in differences(settings, saved, MAY_DIFFER)]
    if changed:
        longer = all(change.startswith(("--steps ", "--epochs ")) for change in changed)
        weights = f" with --encoder.weights {shown(folder)}, to train longer" * longer
        raise ConfigError(
            f"run {shown(folder)} was started with another config ({'; '.join(changed[:4])}"
            f"{'; ...' if len(changed) > 4 else ''}): use the same, or another --name{weights}"
        )
    return note


def _saved(folder: Path) -> tuple[PretrainConfig, str]:
    """The config of a run, and a note where it is the checkpoint's, as config.json is damaged."""
    path = folder / "config.json"
    try:
        return loads(files.read_text(path)), ""
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError) and not isinstance(error, DamagedConfig):
            raise
        why = files.reason(error).removeprefix("the saved config is damaged: ")
    from sslx.runs import checkpoint  # here: it takes torch

    newest, _ = checkpoint.newest(folder, ("config",))
    if newest is None:
        raise ConfigError(
            f"{shown(path)} is damaged ({why}), and there is no checkpoint, which would hold the config too: take "
            "another --name, or delete the folder"
        )
    note = f"{shown(path)} is damaged ({why}): the config of {newest.name} stands in for it"
    return loads(checkpoint.load(newest, needs=("config",))["config"]), note
