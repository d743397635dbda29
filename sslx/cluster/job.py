"""What a submitted job runs on each of its nodes: one rank under Slurm, or all of them on this machine.

Small and pickled by reference.  Listens to signals before it imports anything heavy.
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

_LOCAL_REQUEUE = 144  # submitit.local's word for: start me again


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to be submitted.

    folder: the run's, absolute, with the config as JSON in ``job/recipe.json``.  code: ``code_version()`` where it was
    submitted.  main: ``module:function`` that takes flags and signals.
    """

    folder: str
    code: str
    main: str = "sslx.commands.pretrain:main"

    def __call__(self) -> int:
        """Train; ends the process with the run's exit code where that is not 0."""
        started = time.time()
        streams.make_safe()
        try:
            environment.check()
            limits.check_memory()
            limit_s = give_up_s()
        except ConfigError as error:
            sys.exit(cli.complain(str(error), error.exit_code))
        with StopSignals(limit_s) as stop:  # over submitit's handlers, which leave SIGTERM alone
            stop.leave = lambda code: interrupts.leave(self._answer(code, started))
            code = self._train(stop)
        if code := self._answer(code, started):
            sys.exit(code)
        return 0

    def _train(self, stop: StopSignals) -> int:
        prepare(os.environ)
        if os.environ.get("SLURM_PROCID", "0") == "0" and (now := code_version()) != self.code:
            sys.stdout.write(f"note: the code has changed since the job was submitted: {self.code} -> {now}\n")
        module, function = self.main.split(":")
        recipe = str(Path(self.folder) / "job" / "recipe.json")
        try:
            return getattr(import_module(module), function)([recipe, "--resume", "auto"], stop)
        except UserError as error:
            return cli.complain(str(error), error.exit_code, error.topic)
        except SystemExit as end:  # a recipe that this version of sslx cannot read: by tyro, in its own words
            return ConfigError.exit_code if end.code == 2 else int(end.code or 0)

    def _answer(self, code: int, started: float) -> int:
        """The exit code to whoever started the job; under Slurm the batch script asks what comes next."""
        if code and "SLURM_JOB_ID" not in os.environ:
            code = requeue.main([self.folder, str(code), str(started)])
            return _LOCAL_REQUEUE if code == requeue.SAVED else code
        return code


def prepare(environ: MutableMapping[str, str]) -> None:
    """Threads for this rank's share of the cores, under Slurm only: on one machine the launcher does it.

    Leaves alone what is set.
    """
    environ["TTY_COMPATIBLE"] = "0"  # srun --unbuffered is a terminal to its tasks: rich would draw in the log
    if "SLURM_STEP_ID" not in environ:
        return
    threads = environ.get("SLURM_CPUS_PER_TASK") or str(cores.share(environment.local_world_size(environ)))
    environ.setdefault("OMP_NUM_THREADS", threads)


def main(argv: Sequence[str]) -> int:
    """``FOLDER``: claims the run's folder for this job, for slurm/pretrain.sbatch before it starts the ranks."""
    streams.make_safe()
    try:
        sys.stdout.write(jobs.claim(Path(argv[0]), code_version()))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
