"""The run folder: rank 0 claims or resumes it for all ranks, and this module defines what a checkpoint holds."""

import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from sslx import config, distributed, optim
from sslx.config import PretrainConfig
from sslx.console import activity
from sslx.console.words import one_line, shown
from sslx.encoders import state_dicts
from sslx.errors import ConfigError, DataError, UserError
from sslx.machine import cores, files, hardware, versions
from sslx.machine.code_version import code_version
from sslx.runs import checkpoint, records, state, trackers
from sslx.runs import lock as locks
from sslx.runs.lock import Lock
from sslx.train import finite, resuming
from sslx.train.build import Parts

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A claimed run folder: its lock, and the state to start from (None starts at step 0)."""

    folder: Path
    lock: Lock
    id: str
    state: dict[str, Any] | None
    notes: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """The step to start at."""
        return self.state["step"] if self.state else 0


def call_on_main(function: Callable[[], T]) -> T:
    """Call a function on rank 0 and return its result on all ranks.  A UserError is raised on all of them."""
    result: T | UserError | None = None
    if distributed.rank() == 0:
        try:
            result = function()
        except UserError as error:
            result = error
    result = distributed.broadcast_object(result)
    if isinstance(result, UserError):
        raise result
    return result  # pyright: ignore[reportReturnType]


def will_resume(settings: PretrainConfig) -> bool:
    """Return whether this start will continue from a checkpoint, judged by file names, before the folder is claimed.

    Raise ConfigError if the folder holds a run that the settings do not continue, before anything that takes long.
    """
    folder = settings.runs / settings.name
    _refuse_taken(settings, folder)
    return settings.resume == "auto" and (folder / "config.json").exists() and records.newest_step(folder) > 0


@activity.doing("reading the newest checkpoint")
def claim(settings: PretrainConfig) -> Run:
    """Claim the run folder: create it, or resume the run in it.  Every rank calls this; status.json becomes "running".

    Raise ConfigError for a folder that another process owns, that exists without ``--resume auto``, or that holds a run
    with another config, and DataError if none of its checkpoints is good.
    """
    folder = settings.runs / settings.name
    held: list[Lock] = []  # filled on rank 0
    try:
        path, token, run_id, notes = call_on_main(lambda: _decide(settings, folder, held))
        run = Run(folder, held[0] if held else Lock(folder, token), run_id, None, notes)
        if path is not None:
            loaded = checkpoint.load(path, needs=state.RESUME)
            notes = (*notes, f"resumed {shown(folder)} at step {loaded['step']:,}")
            run = Run(folder, run.lock, loaded["run_id"], loaded, notes)
        if distributed.rank() == 0:
            records.write_status(folder, "running", run.step)
        return run
    except BaseException:
        for lock in held:
            lock.release()
        raise


def _decide(settings: PretrainConfig, folder: Path, held: list[Lock]) -> tuple[Path | None, str, str, tuple[str, ...]]:
    """Return the checkpoint to continue from, the lock's token, wandb's id, and notes.  Append the lock to ``held``."""
    saved, id_file = folder / "config.json", folder / "run_id"
    _refuse_taken(settings, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.append(locks.acquire(folder))
        if not os.path.exists(saved):
            id_file.write_text(trackers.new_run_id())
            files.replace(saved, config.dump(settings).encode())
            return None, held[0].token, trackers.run_id(folder), ()
    except OSError as error:
        raise ConfigError(f"cannot write the run folder {shown(folder)}: {error.strerror}; set --runs") from error
    if note := resuming.check_resumable(settings, folder):
        with suppress(OSError):
            files.replace(saved, config.dump(settings).encode())
    newest, problems = checkpoint.newest(folder, state.RESUME)
    notes = (*([note] if note else ()), *problems)
    if newest is None:
        run_id = trackers.run_id(folder)  # keeps one wandb run, however often the run starts before its first save
        return None, held[0].token, run_id, (*notes, f"{shown(folder)} has no checkpoint yet: starting at step 0")
    return newest, held[0].token, "", notes


def _refuse_taken(settings: PretrainConfig, folder: Path) -> None:
    """Raise ConfigError for a folder that holds a run which the settings do not continue."""
    if os.path.exists(folder / "config.json") and settings.resume != "auto":
        if (owner := locks.read_owner(folder)) and owner[1]:
            raise locks.in_use_error(folder, owner[0])
        resuming.check_resumable(settings, folder)


def note_start(run: Run, device: torch.device, hosts: Sequence[str]) -> None:
    """Add this start to ``starts.jsonl``: the command, the machine and the versions.  Every rank calls this."""
    starts_sslx = Path(sys.argv[0]).name in ("sslx", "__main__.py")  # or it is a job, or another program
    arguments = sys.argv[1:] if starts_sslx else ["pretrain", str(run.folder / "config.json")]
    start = partial(
        records.Start,
        time=round(time.time(), 3),
        step=run.step,
        command=shlex.join(["sslx", *arguments]),
        device=hardware.device_name(device),
        cores=cores.allowed(),
        hosts=list(hosts),
    )
    call_on_main(lambda: records.add_start(run.folder, start(code=code_version(), versions=versions.installed())))


def check(run: Run, is_lost: bool) -> None:
    """Raise StorageError on all ranks if the folder is gone or no longer belongs to this run.

    is_lost: rank 0's finding, on all ranks, which call this together.
    """
    if is_lost:
        call_on_main(run.lock.check)


def roll_back(run: Run, reason: str) -> Run:
    """Return the run at its newest good checkpoint, with the reason in its notes.  Every rank calls this together.

    Raise DataError if no checkpoint is good.
    """
    path, problems = call_on_main(lambda: checkpoint.newest(run.folder, state.RESUME))
    if path is None:
        raise DataError(f"the checkpoints of {run.folder} are gone: there is nothing to return to")
    loaded = checkpoint.load(path, needs=state.RESUME)
    notes = (f"{reason}: back to the checkpoint of step {loaded['step']:,}", *problems)
    return Run(run.folder, run.lock, run.id, loaded, notes)


@activity.doing("saving a checkpoint")
def save(run: Run, settings: PretrainConfig, step: int, parts: Parts) -> None:
    """Write a checkpoint on rank 0, if it is finite on every rank.  Every rank calls this together.

    Raise finite.NotFinite on all ranks, and write nothing, if it is not.
    """
    trained = {"method": parts.method.state_dict(), "optimizer": parts.optimizer.state_dict()}
    not_finite = [name for names in distributed.gather_objects(state.not_finite(trained)) for name in names]
    if not_finite:
        raise finite.NotFinite(f"what is to be saved at step {step:,} is not finite ({not_finite[0]}): it is not saved")
    if distributed.rank() == 0:
        checkpoint.save(run.folder, step, snapshot(run, settings, step, parts), settings.checkpoint.keep)


def snapshot(run: Run, settings: PretrainConfig, step: int, parts: Parts) -> dict[str, object]:
    """Return everything that a restart, a probe or a picture needs."""
    return {
        "config": config.dump(settings),
        "step": step,
        "run_id": run.id,
        "method": parts.method.state_dict(),
        "optimizer": parts.optimizer.state_dict(),
        "loader": parts.loader.state_dict(),
        "size": parts.plan.size,
        "encoder_recipe": asdict(parts.method.encoder.recipe),
        "exported": parts.method.exported_module,
        "eval_view": asdict(parts.plan.eval_view),
        "num_classes": len(parts.source.facts.classes or ()),
    }


def restore(run: Run, settings: PretrainConfig, parts: Parts) -> None:
    """Load a snapshot's state.  Raise DataError if it belongs to another architecture."""
    if run.state is None:
        return
    recipe: Mapping[str, Any] = run.state.get("encoder_recipe", {})
    state_dicts.load(
        parts.method,
        run.state["method"],
        f"checkpoint of {run.folder}",
        expected=settings.encoder.name,
        got=recipe.get("name"),
    )
    optim.load_state(parts.optimizer, run.state["optimizer"], f"checkpoint of {run.folder}")
    try:
        parts.loader.load_state_dict(run.state["loader"])
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        problem = f"checkpoint of {run.folder} was not written by sslx"
        raise DataError(f"{problem}: its 'loader': {one_line(error)}: use another checkpoint") from error
