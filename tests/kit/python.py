"""Python and ``sslx`` in processes of their own, for what a test cannot do in its own process."""

import os
import subprocess
import sys
from pathlib import Path


def python(
    *argv: object, exit_code: int | None = 0, cwd: Path | None = None, without: tuple[str, ...] = (), **environ: str
) -> subprocess.CompletedProcess[str]:
    """``python ARGV ...`` on one thread, which must end with this exit code; None: with any.

    environ: variables to set.  without: the beginnings of variables to leave out.
    """
    others = {name: value for name, value in os.environ.items() if not name.startswith(without)}
    command, variables = [sys.executable, *map(str, argv)], others | {"OMP_NUM_THREADS": "1"} | environ
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)
    assert exit_code in (None, done.returncode), f"exit code {done.returncode}: {done.stdout}{done.stderr}"
    return done
