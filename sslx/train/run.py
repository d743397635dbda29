"""The run folder: claimed or resumed by rank 0, the same decision on all ranks, and what a checkpoint holds."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from sslx import checkpoint, config, distributed, log, outcome
from sslx.config import PretrainConfig
from sslx.errors import ConfigError, DataError, UserError
from sslx.train.build import Parts

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A claimed run folder: where to start, and the state to start from (None: afresh)."""

    folder: Path
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


def claim(settings: PretrainConfig) -> Run:
    """Make the run folder, or resume the run in it; status.json says "running" then.  Every rank calls this together.

    ConfigError for a folder that exists without ``--resume auto`` or holds a run of another config; DataError
    where none of its checkpoints is good.
    """
    folder = settings.runs / settings.name
    found, run_id, notes = on_main(lambda: _decide(settings, folder))
    run = Run(folder, run_id, None, notes)
    if found is not None:
        state = checkpoint.load(found)
        run = Run(folder, state["run_id"], state, (*notes, f"resumed {folder} at step {state['step']:,}"))
    if distributed.rank() == 0:
        outcome.write_status(folder, "running", run.step)
    return run


def _decide(settings: PretrainConfig, folder: Path) -> tuple[Path | None, str, tuple[str, ...]]:
    saved = folder / "config.json"
    if not saved.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "run_id").write_text(log.new_run_id())
            outcome.replace(saved, config.dump(settings).encode())
        except OSError as error:
            raise ConfigError(f"cannot write the run folder {folder}: {error.strerror}; set --runs") from error
        return None, (folder / "run_id").read_text(), ()
    config.check_resumable(settings, folder)
    newest, problems = checkpoint.newest(folder)
    if newest is None:
        run_id = (folder / "run_id").read_text()  # one wandb run, however often it starts before its first save
        return None, run_id, (f"{folder} has no checkpoint yet: starting at step 0",)
    return newest, "", tuple(problems)


def save(run: Run, settings: PretrainConfig, step: int, parts: Parts) -> None:
    """Write a checkpoint, on rank 0; every rank may call this."""
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
        "size": settings.data.size or parts.source.size,
        "eval_view": asdict(parts.view),
        "num_classes": len(parts.source.classes or ()),
    }


def restore(run: Run, settings: PretrainConfig, parts: Parts) -> None:
    """Put a snapshot's state back.  DataError where it is another architecture's."""
    if run.state is None:
        return
    before = config.loads(run.state["config"])
    checkpoint.load_weights(
        parts.method,
        run.state["method"],
        f"checkpoint of {run.folder}",
        expected=settings.encoder.name,
        found=before.encoder.name,
    )
    try:
        parts.optimizer.load_state_dict(run.state["optimizer"])
    except ValueError as error:
        raise DataError(f"checkpoint of {run.folder} has another optimizer's state: {error}") from error
    parts.loader.load_state_dict(run.state["loader"])
