"""Whether this tree is as fast as another commit: both take turns, window after window, each in processes of its own.

    python benchmarks/bench_against.py COMMIT --root FOLDER_OF_SMALL_IMAGES [--photos FOLDER_OF_PHOTOS]

The loader of each tree makes batches, with nothing beside it.  The step is that of a whole run, as `sslx pretrain`
takes it: loader, finite checks, what ranks tell each other, log lines.  Its rate is that between the run's first log
line and its last.  Fails where this tree is slower by more than 2 % and by more than the spread.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from sslx import measure

HERE = Path(__file__).parents[1]
RESULTS = HERE / "benchmarks" / "results" / "against.jsonl"
ALLOWED = 0.02
LOADER = """
import sys, time
from sslx import config, distributed
from sslx.train.build import build
settings = config.load(sys.argv[1:])
loader = build(settings, distributed.init("cpu"), lambda _: None).loader
for _ in range(3):
    next(loader)
for line in sys.stdin:
    start = time.perf_counter()
    for _ in range(int(line)):
        next(loader)
    print(int(line) * settings.batch_size / (time.perf_counter() - start), flush=True)
"""
SMALL = "--encoder.layers 1 1 1 1 --encoder.channels 8 16 32 64 --online.every 0 --device cpu --precision fp32".split()
RUN = (
    "--encoder.layers 1 1 1 1 --encoder.channels 16 16 32 64 --optim.name sgd --device cpu --precision fp32 "
    "--log.every 5 --checkpoint.every 0"
).split()


def environment(tree: Path, threads: int) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{tree}:{tree / 'kernels'}", "OMP_NUM_THREADS": str(threads)}


def loader(stack: ExitStack, tree: Path, batches: int, flags: list[str]) -> Callable[[], float]:
    """Samples a second of a process that stays up and makes batches when it is asked to."""
    process = stack.enter_context(
        subprocess.Popen(
            [sys.executable, "-c", LOADER, *SMALL, *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(tree, 1),
        )
    )
    stack.callback(process.kill)

    def window() -> float:
        assert process.stdin
        assert process.stdout
        process.stdin.write(f"{batches}\n")
        process.stdin.flush()
        while True:  # builds of older commits may print what they found
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"the loader of {tree} ended")
            try:
                return float(line)
            except ValueError:
                continue

    return window


def run(tree: Path, ranks: int, flags: list[str]) -> Callable[[], float]:
    """Samples a second of a whole run."""

    def window() -> float:
        with tempfile.TemporaryDirectory() as folder:
            argv = ["--runs", folder, "--name", "r", "--ranks", str(ranks), *RUN, *flags]
            done = subprocess.run(
                [sys.executable, "-m", "sslx", "pretrain", *argv],
                env=environment(tree, max(1, measure.stamp()["cores"] // ranks)),
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise SystemExit(f"the run of {tree} ended with {done.returncode}: {done.stderr}")
            lines = [json.loads(line) for line in (Path(folder) / "r" / "metrics.jsonl").read_text().splitlines()]
        first, last = lines[1], lines[-1]
        return (last["step"] - first["step"]) * 64 / (last["time"] - first["time"])

    return window


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what to compare with")
    parser.add_argument("--root", type=Path, required=True, help="class folders of images of 32 px")
    parser.add_argument("--photos", type=Path, help="a folder of photos")
    parser.add_argument("--windows", type=int, default=measure.WINDOWS)
    parser.add_argument("--only", help="measure what has this word in its name")
    args = parser.parse_args()
    found: dict[str, str] = {}
    for root in filter(None, (args.root, args.photos)):  # both trees read the same files in the same order: the first
        for path in root.rglob("*.*"):  # one would find them on the disk, and the other one in memory
            path.read_bytes()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        old = folder / "old"
        subprocess.run(["git", "-C", HERE, "worktree", "add", "--detach", "--quiet", old, args.commit], check=True)
        stack.callback(subprocess.run, ["git", "-C", HERE, "worktree", "remove", "--force", old], check=False)
        images = ["--data.source", "folder", "--data.root", str(args.root)]
        cases: dict[str, Callable[[ExitStack, Path], Callable[[], float]]] = {}
        for backend, threads in (("dali", 1), ("dali", 2), ("torchvision", 2), ("resident", 1)):
            flags = [*images, "--data.size", "32", "--batch-size", "256"]
            flags += ["--data.backend", backend, "--data.threads", str(threads)]
            cases[f"loader, {backend}, {threads} threads, 32 px"] = lambda up, tree, flags=flags: loader(
                up, tree, 20, flags
            )
        if args.photos:
            flags = ["--data.source", "folder", "--data.root", str(args.photos), "--data.size", "224"]
            flags += ["--batch-size", "32", "--data.backend", "dali", "--data.threads", "2"]
            cases["loader, dali, 2 threads, photos at 224 px"] = lambda up, tree, flags=flags: loader(
                up, tree, 6, flags
            )
        digits = ["--data.source", "digits", "--batch-size", "64"]
        for ranks in (1, 2):
            cases[f"run, {ranks} ranks"] = lambda _, tree, ranks=ranks: run(tree, ranks, [*digits, "--steps", "60"])
        for name, case in cases.items():
            if args.only and args.only not in name:
                continue
            with ExitStack() as up:
                rates = measure.take_turns({"this": case(up, HERE), "other": case(up, old)}, args.windows)
            ratios = measure.spread([a / b for a, b in zip(rates["this"], rates["other"], strict=True)])
            this, other = (measure.spread(rates[tree]) for tree in ("this", "other"))
            slow = ratios["median"] < 1 - ALLOWED and ratios["p80"] < 1
            found[name] = "SLOWER" if slow else "ok"
            print(
                f"{name}: {this['median']:,.0f} samples/s, {other['median']:,.0f} at {args.commit}: "
                f"{ratios['median']:.3f} times (p20 {ratios['p20']:.3f}, p80 {ratios['p80']:.3f}) {found[name]}",
                flush=True,
            )
            record = {"benchmark": "against", "what": name, "other_commit": args.commit, "ratio": ratios}
            measure.append(RESULTS, {**record, "this": this, "other": other})
    return 1 if "SLOWER" in found.values() else 0


if __name__ == "__main__":
    sys.exit(main())
