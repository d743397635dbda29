"""The run folder: claimed or resumed by rank 0, the same decision on all ranks, and what a checkpoint holds."""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from sslx import config, distributed, optim
from sslx.config import PretrainConfig
from sslx.console import activity
from sslx.console.words import one_line, shown
from sslx.encoders import state_dicts
from sslx.errors import ConfigError, DataError, UserError
from sslx.machine import files
from sslx.runs import checkpoint, log, records, state
from sslx.runs import lock as locks
from sslx.runs.lock import Lock
from sslx.train import finite, resuming
from sslx.train.build import Parts

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A claimed run folder: its lock, where to start, and the state to start from (None: afresh)."""

    folder: Path
    lock: Lock
    id: str
    state: dict[str, Any] | None
    notes: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return self.state["step"] if self.state else 0


def on_main(decide: Callable[[], T]) -> T:
    """What rank 0 finds, on all ranks; a user's error on rank 0 is raised on all of them."""
    result: T | UserError | None = None
    if distributed.rank() == 0:
        try:
            result = decide()
        except UserError as error:
            result = error
    result = distributed.broadcast_object(result)
    if isinstance(result, UserError):
        raise result
    return result  # pyright: ignore[reportReturnType]


def resumes(settings: PretrainConfig) -> bool:
    """Whether this start will go on from a checkpoint, as far as names tell: what is needed before it is claimed.

    ConfigError where the folder holds a run and nothing says to go on with it: before anything that takes long.
    """
    folder = settings.runs / settings.name
    _refuse_taken(settings, folder)
    return settings.resume == "auto" and (folder / "config.json").exists() and records.newest_step(folder) > 0


@activity.doing("reading the newest checkpoint")
def claim(settings: PretrainConfig) -> Run:
    """Own the run folder: make it, or resume the run in it; status.json says "running" then.  Every rank calls this.

    ConfigError for a folder that another process owns, that exists without ``--resume auto`` or that holds a run of
    another config; DataError where none of its checkpoints is good.
    """
    folder = settings.runs / settings.name
    held: list[Lock] = []  # on rank 0
    try:
        found, token, run_id, notes = on_main(lambda: _decide(settings, folder, held))
        run = Run(folder, held[0] if held else Lock(folder, token), run_id, None, notes)
        if found is not None:
            loaded = checkpoint.load(found, needs=state.RESUME)
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
    """(checkpoint to go on from, the lock's token, wandb's id, notes); the lock itself goes to ``held``."""
    saved, id_file = folder / "config.json", folder / "run_id"
    _refuse_taken(settings, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.append(locks.acquire(folder))
        if not os.path.exists(saved):
            id_file.write_text(log.new_run_id())
            files.replace(saved, config.dump(settings).encode())
            return None, held[0].token, log.run_id(folder), ()
    except OSError as error:
        raise ConfigError(f"cannot write the run folder {shown(folder)}: {error.strerror}; set --runs") from error
    if note := resuming.check_resumable(settings, folder):
        with suppress(OSError):
            files.replace(saved, config.dump(settings).encode())
    newest, problems = checkpoint.newest(folder, state.RESUME)
    notes = (*([note] if note else ()), *problems)
    if newest is None:
        run_id = log.run_id(folder)  # one wandb run, however often it starts before its first save
        return None, held[0].token, run_id, (*notes, f"{shown(folder)} has no checkpoint yet: starting at step 0")
    return newest, held[0].token, "", notes


def _refuse_taken(settings: PretrainConfig, folder: Path) -> None:
    """Raise ConfigError for a folder that holds a run which these settings do not say to go on with."""
    if os.path.exists(folder / "config.json") and settings.resume != "auto":
        if (owner := locks.read_owner(folder)) and owner[1]:
            raise locks.in_use_error(folder, owner[0])
        resuming.check_resumable(settings, folder)


def check(run: Run, lost: bool) -> None:
    """Raise StorageError on all ranks where the folder is gone or no longer this run's.

    lost: what rank 0 saw of it, on all ranks, which call this together.
    """
    if lost:
        on_main(run.lock.check)


def go_back(run: Run, reason: str) -> Run:
    """The run at its newest good checkpoint, for a reason that the notes say.  Every rank calls this together.

    DataError where none is good.
    """
    found, problems = on_main(lambda: checkpoint.newest(run.folder, state.RESUME))
    if found is None:
        raise DataError(f"the checkpoints of {run.folder} are gone: nothing is left to go back to")
    loaded = checkpoint.load(found, needs=state.RESUME)
    notes = (f"{reason}: back to the checkpoint of step {loaded['step']:,}", *problems)
    return Run(run.folder, run.lock, run.id, loaded, notes)


@activity.doing("saving a checkpoint")
def save(run: Run, settings: PretrainConfig, step: int, parts: Parts) -> None:
    """Write a checkpoint, on rank 0, if what is to be saved is finite on every rank.  Every rank calls this together.

    finite.NotFinite, on all ranks, where it is not; nothing is written then.
    """
    trained = {"method": parts.method.state_dict(), "optimizer": parts.optimizer.state_dict()}
    named = [name for names in distributed.gather_objects(state.not_finite(trained)) for name in names]
    if named:
        raise finite.NotFinite(f"what is to be saved at step {step:,} is not finite ({named[0]}): it is not saved")
    if distributed.rank() == 0:
        checkpoint.save(run.folder, step, snapshot(run, settings, step, parts), settings.checkpoint.keep)


def snapshot(run: Run, settings: PretrainConfig, step: int, parts: Parts) -> dict[str, object]:
    """Everything that a restart, a probe or a picture needs."""
    return {
        "config": config.dump(settings),
        "step": step,
        "run_id": run.id,
        "method": parts.method.state_dict(),
        "optimizer": parts.optimizer.state_dict(),
        "loader": parts.loader.state_dict(),
        "size": parts.plan.size,
        "encoder_recipe": asdict(parts.method.encoder.recipe),
        "exported": parts.method.exported_name,
        "eval_view": asdict(parts.plan.eval_view),
        "num_classes": len(parts.source.classes or ()),
    }


def restore(run: Run, settings: PretrainConfig, parts: Parts) -> None:
    """Put a snapshot's state back.  DataError where it is another architecture's."""
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
        what = f"checkpoint of {run.folder} was not written by sslx"
        raise DataError(f"{what}: its 'loader': {one_line(error)}: take another checkpoint") from error
