"""The last words of a run: where everything is, and the commands that come next.  Imports nothing heavy."""

import os
import shlex
from pathlib import Path

from sslx.console.words import shown


def resume_command(folder: Path) -> str:
    """The command that goes on with a run, with all that its user gave."""
    return f"sslx resume {_word(folder)}"


def to_go_on(folder: Path) -> list[str]:
    """The lines that say how to go on with a run; none for a job of Slurm's, which goes on by itself."""
    return [] if "SLURM_JOB_ID" in os.environ else ["to go on:", f"  {resume_command(folder)}"]


def stopped(folder: Path, step: int, saved: int, cause: str) -> list[str]:
    """Of a run that was stopped.  saved: the step of its newest checkpoint, 0 without one.  cause: as "Ctrl-C"."""
    if not saved:
        return [f"stopped by {cause} before the first checkpoint: nothing is saved", *to_go_on(folder)]
    lost = f" of step {saved:,}" if step != saved else ""
    at = f"stopped at step {step:,}" if step else "stopped"
    return [f"{at} by {cause}; checkpoint{lost}: {_checkpoint(folder, saved)}", *to_go_on(folder)]


def failed(folder: Path, saved: int) -> list[str]:
    """Of a run that a crash or a full disk has ended, and that may go on."""
    return [f"checkpoint of step {saved:,}: {_checkpoint(folder, saved)}", *to_go_on(folder)] if saved else []


def finished(folder: Path, step: int) -> list[str]:
    """Of a run that is done."""
    return [
        f"done: {_steps(step)}; run folder: {shown(folder)}; checkpoint: {_checkpoint(folder, step)}",
        "next:",
        f"  sslx probe {_word(folder)}",
        f"  sslx plot {_word(folder)}",
    ]


def finished_before(folder: Path, step: int) -> list[str]:
    """Of a run that was to go on and is done already."""
    return [
        f"{shown(folder)} is finished already ({_steps(step)}): there is nothing to do",
        "to train longer, start a new run from its weights:",
        f"  sslx pretrain {_word(folder / 'config.json')} --name NAME --encoder.weights {_word(folder)}",
    ]


def _steps(count: int) -> str:
    return f"{count:,} step{'s' * (count != 1)}"


def _checkpoint(folder: Path, step: int) -> str:
    return shown(folder / "checkpoints" / f"step_{step}")


def _word(path: Path) -> str:
    """A path as a word of a shell's command line."""
    return shown(shlex.quote(os.fsdecode(path)))
