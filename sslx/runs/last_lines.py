"""The lines that end a run's output: where its files are and which commands come next.  Imports nothing heavy."""

import os
import shlex
from pathlib import Path

from sslx.console.words import plural, shown


def resume_command(folder: Path) -> str:
    """Return the command that continues a run with all of the user's settings."""
    return f"sslx resume {_word(folder)}"


def how_to_continue(folder: Path) -> list[str]:
    """Return the lines that say how to continue a run.  A Slurm job continues by itself and gets none."""
    return [] if "SLURM_JOB_ID" in os.environ else ["to continue:", f"  {resume_command(folder)}"]


def stopped(folder: Path, step: int, saved: int, cause: str) -> list[str]:
    """Return the lines for a run that was stopped.

    saved: step of the newest checkpoint, 0 if there is none.  cause: the signal, such as "Ctrl-C".
    """
    if not saved:
        return [f"stopped by {cause} before the first checkpoint: nothing is saved", *how_to_continue(folder)]
    saved_step = f" of step {saved:,}" if step != saved else ""
    at = f"stopped at step {step:,}" if step else "stopped"
    return [f"{at} by {cause}; checkpoint{saved_step}: {_checkpoint(folder, saved)}", *how_to_continue(folder)]


def failed(folder: Path, saved: int) -> list[str]:
    """Return the lines for a run that ended in a crash or on a full disk, and that can be continued."""
    if not saved:
        return []
    return [f"checkpoint of step {saved:,}: {_checkpoint(folder, saved)}", *how_to_continue(folder)]


def finished(folder: Path, step: int) -> list[str]:
    """Return the lines for a run that has just finished."""
    return [
        f"done: {plural(step, 'step')}; run folder: {shown(folder)}; checkpoint: {_checkpoint(folder, step)}",
        "next:",
        f"  sslx probe {_word(folder)}",
        f"  sslx plot {_word(folder)}",
    ]


def finished_before(folder: Path, step: int) -> list[str]:
    """Return the lines for a run that was to be resumed but had already finished."""
    return [
        f"{shown(folder)} has already finished ({plural(step, 'step')}): there is nothing to do",
        "to train longer, start a new run from its weights:",
        f"  sslx pretrain {_word(folder / 'config.json')} --name NAME --encoder.weights {_word(folder)}",
    ]


def _checkpoint(folder: Path, step: int) -> str:
    return shown(folder / "checkpoints" / f"step_{step}")


def _word(path: Path) -> str:
    """Quote a path for a shell command."""
    return shown(shlex.quote(os.fsdecode(path)))
