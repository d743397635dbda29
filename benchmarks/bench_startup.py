"""From the command to the first training step, on one rank and on two, and to help and a wrong flag's answer.

python benchmarks/bench_startup.py
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sslx.bench import measure

RESULTS = Path(__file__).parent / "results" / "startup.jsonl"
LIMITS_S = {1: 12.0, 2: 18.0}
ANSWERS = {"--help": 0.5, "pretrain --bogus 1": 0.5, "pretrain --help": 1.5, "pretrain --help-all": 1.5}
"""Seconds in which each is to be answered."""


def first_step(ranks: int) -> float:
    """Seconds until the first step is logged; the clock in metrics.jsonl is the same machine's."""
    folder = Path(tempfile.mkdtemp(prefix="sslx-startup-"))
    flags = [
        "simclr_digits",
        "--runs",
        str(folder),
        "--steps",
        "2",
        "--online.every",
        "0",
        "--ranks",
        str(ranks),
    ]
    start = time.time()
    subprocess.run([sys.executable, "-m", "sslx", "pretrain", *flags], check=True, stdout=subprocess.DEVNULL)
    lines = (folder / "simclr_digits" / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(folder)
    return next(line["time"] for line in map(json.loads, lines) if line["step"] == 1) - start


def answer(arguments: str) -> float:
    """Seconds until ``sslx`` has answered and ended."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "sslx", *arguments.split()], capture_output=True, check=False)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="counted runs each, after one warm-up")
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    arms = {str(ranks): (lambda ranks=ranks: first_step(ranks)) for ranks in LIMITS_S}
    found = {int(name): measure.summarize(values) for name, values in measure.take_turns(arms, args.runs).items()}
    for ranks, figures in found.items():
        print(
            f"{ranks} rank(s): first step after {figures['median']:.1f} s "
            f"({figures['p20']:.1f} to {figures['p80']:.1f}; limit {LIMITS_S[ranks]:.0f})"
        )
    arms = {arguments: (lambda arguments=arguments: answer(arguments)) for arguments in ANSWERS}
    answers = {name: measure.summarize(values) for name, values in measure.take_turns(arms, args.runs).items()}
    for name, figures in answers.items():
        print(
            f"sslx {name}: {figures['median']:.2f} s ({figures['p20']:.2f} to {figures['p80']:.2f}; limit "
            f"{ANSWERS[name]:g})"
        )
    if not args.no_record:
        record = {"seconds": found, "limits": LIMITS_S, "answers": answers, "answer_limits": ANSWERS}
        measure.append(RESULTS, {"benchmark": "startup", **record})
    late = any(figures["median"] > LIMITS_S[ranks] for ranks, figures in found.items())
    return int(late or any(figures["median"] > ANSWERS[name] for name, figures in answers.items()))


if __name__ == "__main__":
    sys.exit(main())
