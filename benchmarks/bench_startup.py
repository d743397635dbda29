"""Time from the command to the first training step, with one rank and two, and to the answer of quick commands.

python benchmarks/run.py startup
"""

import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from harness import Session, benchmark

from sslx.bench import measure

LIMITS_S = {1: 12.0, 2: 18.0}
"""Limit of the time to the first step, by number of ranks."""
ANSWER_LIMITS_S = {"--help": 0.5, "pretrain --bogus 1": 0.5, "pretrain --help": 1.5, "pretrain --help-all": 1.5}


def first_step_s(ranks: int) -> float:
    """Seconds until the first step is logged."""
    with tempfile.TemporaryDirectory(prefix="sslx-startup-") as folder:
        flags = f"simclr_digits --runs {folder} --steps 2 --online.every 0 --ranks {ranks}".split()
        start = time.time()
        subprocess.run([sys.executable, "-m", "sslx", "pretrain", *flags], check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "simclr_digits" / "metrics.jsonl").read_text().splitlines()
    return next(line["time"] for line in map(json.loads, lines) if line["step"] == 1) - start


def answer_s(arguments: str) -> float:
    """Seconds until ``sslx`` has answered and exited."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "sslx", *arguments.split()], capture_output=True, check=False)
    return time.perf_counter() - start


@benchmark(windows=5)
def run(session: Session) -> bool:
    windows = session.options.windows
    steps = measure.take_turns({str(ranks): partial(first_step_s, ranks) for ranks in LIMITS_S}, windows)
    seconds = {int(ranks): measure.summarize(values) for ranks, values in steps.items()}
    turns = measure.take_turns({command: partial(answer_s, command) for command in ANSWER_LIMITS_S}, windows)
    answers = {command: measure.summarize(values) for command, values in turns.items()}
    for ranks, summary in seconds.items():
        print(f"{ranks} rank(s): first step after {measure.text(summary, 1)} s (limit {LIMITS_S[ranks]:.0f} s)")
    for command, summary in answers.items():
        print(f"sslx {command}: {measure.text(summary, 2)} s (limit {ANSWER_LIMITS_S[command]:g} s)")
    session.record(seconds=seconds, limits=LIMITS_S, answers=answers, answer_limits=ANSWER_LIMITS_S)
    return all(seconds[ranks]["median"] <= limit for ranks, limit in LIMITS_S.items()) and all(
        answers[command]["median"] <= limit for command, limit in ANSWER_LIMITS_S.items()
    )
