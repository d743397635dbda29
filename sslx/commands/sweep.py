"""``sslx sweep FILE [RECIPE ...] [flags]``: train the runs of a sweep in turn, and print a table of them."""

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sslx import config
from sslx.config import PretrainConfig, sweeps
from sslx.console.words import shown
from sslx.errors import ConfigError
from sslx.runs import records

HELP = """usage: sslx sweep FILE [RECIPE ...] [--option VALUE ...]

Train the runs that FILE describes, one after the other, and print a table of
them.  FILE is a TOML file:

    [grid]                          # all combinations of these
    "optim.lr" = [0.1, 0.3]
    seed = [0, 1]

or tables [[run]], each with one value for every option that it sets.  The
arguments after FILE apply to all runs.  The same command continues a sweep
that was stopped: finished runs are not repeated.
"""
_TABLE_METRICS = ("loss", "knn", "feature_rank", "samples_per_s")


def main(argv: Sequence[str]) -> int:
    """Train all runs.  Return 0 if all finish, else the exit code of the last run that failed or was stopped."""
    if not argv or argv[0] in ("-h", "--help"):
        if argv:
            sys.stdout.write(HELP)
            return 0
        raise ConfigError("sslx sweep needs a file that describes the runs, as in: sslx sweep lrs.toml simclr_digits")
    runs = sweeps.runs(Path(argv[0]), list(argv[1:]))
    code = 0
    for number, run in enumerate(runs, 1):
        folder = run.runs / run.name
        status = records.read_status(folder) if folder.is_dir() else None
        if status and status.state == "done":
            _print(f"run {number} of {len(runs)}: {shown(folder)} is done")
            continue
        _print(f"run {number} of {len(runs)}: {shown(folder)}")
        run_code = _train(run)
        code = run_code or code
        if run_code in (75, 130):  # the signal that stopped the run stops the whole sweep
            break
    Console(width=None if sys.stdout.isatty() else 120).print(_table(runs))
    if code in (75, 130):
        sys.stdout.write("stopped: the same command continues the sweep\n")
    return code


def _train(run: PretrainConfig) -> int:
    """Train one run in a child process, which gets the terminal's Ctrl-C just as this process does."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "config.json"
        recipe.write_text(config.dump(run), encoding="utf-8")
        process = subprocess.Popen([sys.executable, "-m", "sslx", "pretrain", str(recipe), "--resume", "auto"])
        while True:
            try:
                code = process.wait()
                return 128 - code if code < 0 else code
            except KeyboardInterrupt:
                continue  # the run handles it, and saves


def _table(runs: Sequence[PretrainConfig]) -> Table:
    table = Table(title="sweep", title_justify="left")
    for column in ("run", "state", "step", "loss", "knn", "feature rank", "samples/s"):
        table.add_column(column, justify="left" if column in ("run", "state") else "right")
    for run in runs:
        folder = run.runs / run.name
        status = records.read_status(folder) if os.path.isdir(folder) else None
        latest: dict[str, float] = {}
        for metrics in records.read_metrics(folder / "metrics.jsonl") if status else ():
            latest |= {name: x for name, x in metrics.items() if name in _TABLE_METRICS and math.isfinite(x)}
        cells = [f"{latest[name]:.4g}" if name in latest else "-" for name in _TABLE_METRICS]
        table.add_row(
            Text(shown(run.name)), status.state if status else "-", f"{status.step:,}" if status else "-", *cells
        )
    return table


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
