"""Whether the tests hold every time: tests many times in a row, a line for each in benchmarks/results/soak.jsonl.

    python tests/soak.py numerical --isa avx2 avx512 sse   the slow tier's numerical tests, imitating each CPU
    python tests/soak.py fast --busy 2 --at-once 2         the fast tier beside two busy loops, twice at the same time

--times 20: runs of each.  --at-once 1: runs of each that share the machine.  What comes after -- goes to pytest.

Uses the Python that runs it: .venv/bin/python, or .venv-oldest/bin/python for the oldest supported packages.
Ends with 1 where a run had a failure.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from importlib import metadata
from multiprocessing.pool import ThreadPool
from pathlib import Path

from kit import instruction_sets
from sslx.bench import measure
from sslx.machine import cores

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "soak.jsonl"
TIERS = {
    "numerical": "slow and numerical and not gpu and not slurm and not soak",
    "fast": "not slow and not gpu and not slurm and not soak",
}
NO_NUMBERS = "--deselect=tests/train/test_fake_cuda.py"
"""Of the numerical tests those whose tensors are fake: the CPU has no part in them."""


def run(tier: str, isa: str | None, options: list[str]) -> dict[str, object]:
    """Run pytest once and return what goes into the results."""
    environ = os.environ | {"OMP_NUM_THREADS": "1"} | (instruction_sets.environment(isa) if isa else {})
    jobs = min(4, cores.allowed())
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        str(jobs),
        "--dist",
        "worksteal",
        "-m",
        TIERS[tier],
        *([NO_NUMBERS] if isa else []),
        *options,
    ]
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True, check=False)
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (\w+)", done.stdout.splitlines()[-1])}
    return {
        "benchmark": "soak",
        "tier": tier,
        "isa": isa or "native",
        "options": options,
        "passed": counts.get("passed", 0),
        "failed": counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0),
        "skipped": counts.get("skipped", 0),
        "failures": re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE),
        "exit_code": done.returncode,
        "seconds": round(time.monotonic() - start, 1),
    }


@contextmanager
def busy_loops(number: int) -> Generator[None]:
    """Let ``number`` processes that do nothing but compute run beside the tests."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tier", choices=TIERS)
    parser.add_argument("--isa", nargs="+", default=[], choices=instruction_sets.NAMES, help="CPUs to imitate in turn")
    parser.add_argument("--times", type=int, default=20, help="runs of each")
    parser.add_argument("--busy", type=int, default=0, help="busy loops beside the tests")
    parser.add_argument("--at-once", type=int, default=1, help="runs of each that share the machine")
    ours, options = sys.argv[1:], list[str]()
    if "--" in ours:
        ours, options = ours[: ours.index("--")], ours[ours.index("--") + 1 :]
    arguments = parser.parse_args(ours)
    if missing := sorted(set(arguments.isa) - set(instruction_sets.supported())):
        parser.error(f"this CPU has no {', '.join(missing)}: it can imitate {instruction_sets.supported()}")
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "triton", "timm", "numpy")}
    failed, copies = False, arguments.at_once
    with busy_loops(arguments.busy), ThreadPool(copies) as pool:
        for number in range(1, arguments.times + 1, copies):
            for isa in arguments.isa or [None]:
                stamp = measure.stamp()
                stamp["versions"] = {**stamp["versions"], **versions}
                load = {"busy_loops": arguments.busy, "at_once": copies}
                runs = [(arguments.tier, isa, options)] * copies
                for copy, counts in enumerate(pool.imap(lambda one: run(*one), runs)):
                    record = {**stamp, "run": number + copy, **load, **counts}
                    with RESULTS.open("a", encoding="utf-8") as results:
                        results.write(json.dumps(record) + "\n")
                    failed |= record["exit_code"] != 0
                    sys.stdout.write(
                        f"{number + copy}/{arguments.times} {record['tier']} {record['isa']}: {record['passed']} "
                        f"passed, {record['failed']} failed in {record['seconds']} s {' '.join(record['failures'])}\n"
                    )
                    sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
