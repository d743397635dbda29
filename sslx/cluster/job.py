"""The pickled job that each Slurm task runs (one rank), or that a local job runs (all ranks of this machine).

It is small, pickled by reference, and handles signals before it imports anything heavy.
"""

import os
import sys
import time
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from sslx import cli
from sslx.cluster import jobs, requeue
from sslx.console import streams
from sslx.errors import ConfigError, UserError
from sslx.machine import cores, environment, interrupts, limits
from sslx.machine.code_version import code_version
from sslx.train.signals import StopSignals, give_up_s

_LOCAL_REQUEUE = 144  # exit code at which submitit's local executor starts a job again


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to submit.

    folder: absolute path of the run folder, which has the config in ``job/recipe.json``.  code: ``code_version()`` at
    submission.  main: ``module:function`` to call with the flags and a StopSignals.
    """

    folder: str
    code: str
    main: str = "sslx.commands.pretrain:main"

    def __call__(self) -> int:
        """Train.  If the run's exit code is not 0, end the process with it."""
        started = time.time()
        streams.make_safe()
        try:
            environment.check()
            limits.check_memory()
            limit_s = give_up_s()
        except ConfigError as error:
            sys.exit(cli.complain(str(error), error.exit_code))
        with StopSignals(limit_s) as stop:  # replaces submitit's handlers, which ignore SIGTERM
            stop.leave = lambda code: interrupts.leave(self._job_exit_code(code, started))
            code = self._train(stop)
        if code := self._job_exit_code(code, started):
            sys.exit(code)
        return 0

    def _train(self, stop: StopSignals) -> int:
        set_environment(os.environ)
        current_code = code_version()
        if os.environ.get("SLURM_PROCID", "0") == "0" and current_code != self.code:
            sys.stdout.write(f"note: the code has changed since the job was submitted: {self.code} -> {current_code}\n")
        module, function = self.main.split(":")
        recipe = str(Path(self.folder) / "job" / "recipe.json")
        try:
            return getattr(import_module(module), function)([recipe, "--resume", "auto"], stop)
        except UserError as error:
            return cli.complain(str(error), error.exit_code, error.topic)
        except SystemExit as end:  # tyro has already reported that this version of sslx cannot read the recipe
            return ConfigError.exit_code if end.code == 2 else int(end.code or 0)

    def _job_exit_code(self, code: int, started: float) -> int:
        """Return the exit code for whoever started the job.  Under Slurm, the batch script decides what comes next."""
        if code and "SLURM_JOB_ID" not in os.environ:
            code = requeue.main([self.folder, str(code), str(started)])
            return _LOCAL_REQUEUE if code == requeue.SAVED else code
        return code


def set_environment(environ: MutableMapping[str, str]) -> None:
    """Make ``rich`` print plain text and, under Slurm, give this rank its share of the threads.

    Without Slurm, the launcher sets the threads.  A value that is already set is kept.
    """
    environ["TTY_COMPATIBLE"] = "0"  # srun --unbuffered looks like a terminal, so rich would draw in the log
    if "SLURM_STEP_ID" not in environ:
        return
    threads = environ.get("SLURM_CPUS_PER_TASK") or str(cores.per_process(environment.local_world_size(environ)))
    environ.setdefault("OMP_NUM_THREADS", threads)


def main(argv: Sequence[str]) -> int:
    """Claim the run folder in ``argv`` for this job.  ``slurm/pretrain.sbatch`` does so before it starts the ranks."""
    streams.make_safe()
    try:
        sys.stdout.write(jobs.claim(Path(argv[0]), code_version()))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
