"""Decide whether a run may be resumed: which settings may differ, and what replaces a damaged saved config."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sslx.config import DamagedConfig, PretrainConfig, dump, flags, loads
from sslx.console.words import shown
from sslx.errors import ConfigError
from sslx.machine import files

# Settings in which a resumed run may differ: where and how it runs, not what it computes.
MAY_DIFFER = ("runs", "name", "resume", "ranks", "device", "compile", "deterministic", "source.root",
              "source.test_root", "source.splits", "source.download", "source.cache", "source.cache_gb", "data.threads",
              "data.prefetch", "data.backend", "data.max_bad", "on_nonfinite", "skip_steps", "online", "health",
              "checkpoint", "log")  # fmt: skip


def differences(settings: PretrainConfig, saved: PretrainConfig, ignore: Sequence[str] = ()) -> list[str]:
    """Return ``--flag saved -> new`` for every field that differs, except those under the prefixes in ``ignore``."""
    new, old = leaves(settings), leaves(saved)
    unset = {*settings.unset, *saved.unset}
    changed = sorted(key for key in new.keys() | old.keys() if new.get(key) != old.get(key) and key not in unset)
    kept = [key for key in changed if not any(key == prefix or key.startswith(f"{prefix}.") for prefix in ignore)]
    return [f"--{key.replace('_', '-')} {old.get(key)} -> {new.get(key)}" for key in kept]


def leaves(settings: PretrainConfig) -> dict[str, Any]:
    """Return every field by its dotted name, with values as in JSON."""
    return dict(flags.leaves(json.loads(dump(settings))))


def check_resumable(settings: PretrainConfig, folder: Path) -> str:
    """Raise ConfigError if the folder holds a run that these settings do not continue.

    Return a note if its config.json is damaged and the newest checkpoint's config was compared instead, else "".
    """
    if not os.path.exists(folder / "config.json"):
        return ""
    if settings.resume != "auto":
        raise ConfigError(
            f"run {shown(folder)} exists: continue it with sslx resume {shown(folder)}, or choose another --name"
        )
    saved, note = _saved(folder)
    changed = [shown(change) for change in differences(settings, saved, MAY_DIFFER)]
    if changed:
        only_longer = all(change.startswith(("--steps ", "--epochs ")) for change in changed)
        weights = f" with --encoder.weights {shown(folder)}, to train longer" if only_longer else ""
        more = "; ..." if len(changed) > 4 else ""
        raise ConfigError(
            f"run {shown(folder)} was started with another config ({'; '.join(changed[:4])}{more}): use the same, or "
            f"another --name{weights}"
        )
    return note


def _saved(folder: Path) -> tuple[PretrainConfig, str]:
    """Return the config of a run, and a note if it is the checkpoint's because config.json is damaged."""
    path = folder / "config.json"
    try:
        return loads(files.read_text(path)), ""
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError) and not isinstance(error, DamagedConfig):
            raise
        reason = files.reason(error).removeprefix("the saved config is damaged: ")
    from sslx.runs import checkpoint  # imported here because it imports torch

    newest, _ = checkpoint.newest(folder, ("config",))
    if newest is None:
        raise ConfigError(
            f"{shown(path)} is damaged ({reason}), and there is no checkpoint, which would have the config too: use "
            "another --name, or delete the folder"
        )
    note = f"{shown(path)} is damaged ({reason}): using the config of {newest.name} instead"
    return loads(checkpoint.load(newest, needs=("config",))["config"]), note
