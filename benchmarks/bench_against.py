"""Whether this tree is as fast as another commit: both take turns, window after window, each in processes of its own.

    python benchmarks/bench_against.py COMMIT --root FOLDER_OF_SMALL_IMAGES [--photos FOLDER_OF_PHOTOS]

The loader of each tree makes batches, with nothing beside it.  The step is that of a whole run, as `sslx pretrain`
takes it: loader, finite checks, what ranks tell each other, log lines; each window is 20 steps of a run that stays up
and waits while it is the other one's turn.  Fails where this tree is slower by more than 2 % and more than the spread.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from sslx.bench import measure

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
RUN = """
import os, sys, time
from sslx import cli
from sslx.train import pretrain as loop
train_step, steps, began = loop.train_step, 0, 0.0
def in_windows(*given):
    global steps, began
    if steps % 20 == 0:
        if steps:
            print(20 * 64 / (time.perf_counter() - began), flush=True)
        sys.stdin.readline()
        began = time.perf_counter()
    steps += 1
    return train_step(*given)
if os.environ["RANK"] == "0":
    loop.train_step = in_windows
sys.exit(cli.main(["pretrain", *sys.argv[1:]]))
"""
RUN_FLAGS = (
    "--data.source digits --batch-size 64 --steps 1000000 --encoder.layers 1 1 1 1 --encoder.channels 16 16 32 64 "
    "--optim.name sgd --device cpu --precision fp32 --log.every 5 --checkpoint.every 0"
).split()


def start(
    stack: ExitStack, tree: Path, code: str, threads: int, flags: list[str], **environ: str
) -> subprocess.Popen[str]:
    """A process with the code of ``tree``: its current folder, which is the first of all places to import from."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=tree,
        env=os.environ | {"PYTHONPATH": f"{tree}:{tree / 'kernels'}", "OMP_NUM_THREADS": str(threads)} | environ,
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def loader(stack: ExitStack, tree: Path, batches: int, flags: list[str]) -> Callable[[], float]:
    """Samples a second of a process that stays up and makes batches when it is asked to."""
    return windows(start(stack, tree, LOADER, 1, [*SMALL, *flags]), str(batches))


def run(stack: ExitStack, tree: Path, ranks: int) -> Callable[[], float]:
    """Samples a second of a run of so many ranks."""
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    with socket.create_server(("127.0.0.1", 0)) as free:
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    threads = max(1, measure.stamp()["cores"] // ranks)
    processes = [
        start(stack, tree, RUN, threads, [*RUN_FLAGS, "--runs", folder], RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(ranks)
    ]
    for other in processes[1:]:
        assert other.stdout
        threading.Thread(target=other.stdout.read, daemon=True).start()
    return windows(processes[0], "go")


def windows(process: subprocess.Popen[str], word: str) -> Callable[[], float]:
    """What a process answers each time that it gets the word: a number alone on a line, among others that it prints."""
    assert process.stdin
    assert process.stdout
    given, said = process.stdin, process.stdout

    def window() -> float:
        given.write(f"{word}\n")
        given.flush()
        while line := said.readline():
            try:
                return float(line)
            except ValueError:
                continue
        raise SystemExit(f"a process ended with {process.wait()}: {process.args}")

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
        for ranks in (1, 2):
            cases[f"run, {ranks} ranks"] = lambda up, tree, ranks=ranks: run(up, tree, ranks)
        for name, case in cases.items():
            if args.only and args.only not in name:
                continue
            with ExitStack() as up:
                rates = measure.take_turns({"this": case(up, HERE), "other": case(up, old)}, args.windows)
            ratios = measure.summarize([a / b for a, b in zip(rates["this"], rates["other"], strict=True)])
            this, other = (measure.summarize(rates[tree]) for tree in ("this", "other"))
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
