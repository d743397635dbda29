"""Whether this checkout is as fast as another commit: both take turns, window after window, in processes of their own.

    python benchmarks/run.py against COMMIT --root CIFAR10/train [--photos FOLDER_OF_PHOTOS]

Three kinds of cases.  "step alone", "loader alone" and "end to end" are the arms of ``run.py step`` on the recipe
``simclr_cifar10_cpu``.  "loader, ..." are the loader's backends at 32 px and, with --photos, at 224 px.  "run, ..." are
whole runs of ``sslx pretrain`` on one and two ranks, with finite checks, log lines and what the ranks tell each other.
A process stays up and waits while the other tree has its turn, so only one of them computes at any time.  Options that
have been renamed since the other commit are translated (``images.OLD_FLAGS``).  Records one line with the summary of
the ratios of each case.  Fails if a case is slower by more than 2 % and by more than the spread of its ratios.
"""

import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import images
import other_tree
import torch
from harness import Record, Session, benchmark, option

from sslx.bench import measure
from sslx.machine import cores

MAX_SLOWDOWN = 0.02
WORKLOAD = f"""{other_tree.PRELUDE}
try:
    from sslx.bench import advice
except ImportError:
    from sslx import bench as advice
settings = config.load(flags)
Workload = getattr(advice, "Workload", None) or advice.Recipe
workload = Workload(settings, distributed.init("cpu"), float(os.environ["WINDOW_S"]))
arms = workload.arms()
for line in sys.stdin:
    rate = arms[line.strip()]()
    workload.parts.loader.close()  # otherwise its threads fill their queues in the other tree's turn
    print(rate, flush=True)
"""
RUN = f"""{other_tree.PRELUDE}
from sslx.train import pretrain as loop
train_step, steps, began = loop.train_step, 0, 0.0
def step_in_windows(*arguments):
    global steps, began
    if time.perf_counter() - began > float(os.environ["WINDOW_S"]):
        if steps:
            print(steps * 64 / (time.perf_counter() - began), flush=True)
        sys.stdin.readline()
        steps, began = 0, time.perf_counter()
    steps += 1
    return train_step(*arguments)
if os.environ["RANK"] == "0":
    loop.train_step = step_in_windows
sys.exit(cli.main(["pretrain", *flags]))
"""
CPU = "--device cpu --precision fp32 --online.every 0".split()
SMALL = "--encoder.layers 1 1 1 1 --encoder.channels 8 16 32 64".split()
RUN_FLAGS = (
    "--batch-size 64 --steps 1000000 --encoder.layers 1 1 1 1 --encoder.channels 16 16 32 64 --optim.name sgd "
    "--log.every 5 --checkpoint.every 0"
).split()
Case = Callable[[ExitStack, Path], Callable[[], float]]
"""Starts processes of a tree; returns a window that measures samples/s."""


def start(
    stack: ExitStack, tree: Path, program: str, flags: list[str], threads: int, **environ: str
) -> subprocess.Popen[str]:
    """Start a process with the code of ``tree``: its working directory, which comes first in ``sys.path``."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=tree,
        env=other_tree.environ(tree, threads) | environ,
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def window(process: subprocess.Popen[str], word: str) -> Callable[[], float]:
    """A window that sends a word and waits for the answer: a line with a number, among other lines."""
    assert process.stdin
    assert process.stdout
    stdin, stdout = process.stdin, process.stdout

    def rate() -> float:
        stdin.write(f"{word}\n")
        stdin.flush()
        while line := stdout.readline():
            try:
                return float(line)
            except ValueError:
                continue
        raise SystemExit(f"a process ended with {process.wait()}: {process.args}")

    return rate


def arm(name: str, flags: list[str], threads: int, seconds: float, stack: ExitStack, tree: Path) -> Callable[[], float]:
    """An arm of a workload."""
    return window(start(stack, tree, WORKLOAD, [*flags, *CPU], threads, WINDOW_S=str(seconds)), name)


def whole_run(ranks: int, seconds: float, stack: ExitStack, tree: Path) -> Callable[[], float]:
    """A run of ``sslx pretrain`` on several ranks."""
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    with socket.create_server(("127.0.0.1", 0)) as free:
        environ = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    flags = [*images.flags("digits"), *RUN_FLAGS, *CPU, "--runs", folder]
    threads = max(1, cores.allowed() // ranks)
    processes = [
        start(stack, tree, RUN, flags, threads, RANK=str(rank), LOCAL_RANK=str(rank), WINDOW_S=str(seconds), **environ)
        for rank in range(ranks)
    ]
    for other in processes[1:]:
        assert other.stdout
        threading.Thread(target=other.stdout.read, daemon=True).start()
    return window(processes[0], "go")


def cases(root: Path, photos: Path | None, seconds: float) -> dict[str, Case]:
    """All cases by name."""
    recipe = ["simclr_cifar10_cpu", *images.flags("folder", root)]
    all_cases: dict[str, Case] = {
        name: partial(arm, name, recipe, cores.allowed(), seconds)
        for name in ("step alone", "loader alone", "end to end")
    }
    small = [*images.flags("folder", root), *SMALL, *"--data.size 32 --batch-size 256".split()]
    for backend, threads in (("dali", "1"), ("dali", "2"), ("torchvision", "2"), ("resident", "1")):
        flags = [*small, "--data.backend", backend, "--data.threads", threads]
        window_s = 4 * seconds if backend == "torchvision" else seconds  # its workers make two batches at once
        all_cases[f"loader, {backend}, {threads} thread(s), 32 px"] = partial(arm, "loader alone", flags, 1, window_s)
    if photos:
        flags = [*images.flags("folder", photos), *SMALL, *"--data.size 224 --batch-size 32".split()]
        flags += ["--data.backend", "dali", "--data.threads", "2"]
        all_cases["loader, dali, 2 threads, photos at 224 px"] = partial(arm, "loader alone", flags, 1, seconds)
    for ranks in (1, 2):
        all_cases[f"run, {ranks} rank(s)"] = partial(whole_run, ranks, seconds)
    return all_cases


@benchmark(
    option("commit", help="the commit to compare with"),
    option("--root", type=Path, required=True, help="images of 32 px in class folders"),
    option("--photos", type=Path, help="folder of photos"),
    option("--only", default="", help="measure only the cases with this text in their names"),
    windows=30,
    seconds=1.0,
)
def run(session: Session) -> bool:
    options, figures = session.options, dict[str, Record]()
    noise = measure.warn_of_noise(torch.device("cpu"), print)
    for root in filter(None, (options.root, options.photos)):
        for path in root.rglob("*.*"):  # into the page cache: otherwise the first tree would read from the disk
            path.read_bytes()
    slow: list[str] = []
    with other_tree.checkout(options.commit) as other:
        for name, case in cases(options.root, options.photos, options.seconds).items():
            if options.only not in name:
                continue
            with ExitStack() as stack:
                arms = {"this": case(stack, other_tree.HERE), "other": case(stack, other)}
                rates = measure.take_turns(arms, options.windows)
            ratio = measure.summarize([a / b for a, b in zip(rates["this"], rates["other"], strict=True)])
            figures[name] = {"ratio": ratio, **{tree: measure.summarize(values) for tree, values in rates.items()}}
            if ratio["median"] < 1 - MAX_SLOWDOWN and ratio["p80"] < 1:
                slow.append(name)
            print(
                f"{name}: {measure.text(figures[name]['this'])} samples/s, at {options.commit} "
                f"{measure.text(figures[name]['other'])}: ratio {measure.text(ratio, 3)}"
                f"{' SLOWER' if name in slow else ''}",
                flush=True,
            )
    session.record(other_commit=options.commit, window_s=options.seconds, noise=noise, cases=figures)
    return not slow
