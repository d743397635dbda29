"""Everything that needs a GPU, as parts that each end in under eight minutes and leave a results file of their own.

    python benchmarks/gpu_suite.py --cifar DIR --photos DIR        (folders: train/CLASS/*, test/CLASS/*; any images)
    python benchmarks/gpu_suite.py --list                          (what would run, and what has)
    python benchmarks/gpu_suite.py --table                         (what has been measured)

Parts that are done are left out, so that a machine that is lent for minutes at a time gets through all of them, what
matters most first; a part that trains saves before its time is over and goes on at the next call.  What a part measured
is in OUT/PART.jsonl, what it printed in OUT/PART.log, how it ended in OUT/PART.json; checkpoints stay in --runs.
Without a GPU it prints what it would run.  Ends with 0 where all is done, with 75 where parts are to be gone on with,
with 1 where one has failed.  It takes torch, tyro, timm, rich, and pytest for the tests.  Without DALI the loaders are
torchvision's; CIFAR-10 is held in the GPU's memory either way.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_table
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # a copy that is not installed

from sslx import data  # noqa: E402
from sslx.bench import measure  # noqa: E402

GPU_TESTS = ("tests/gpu", "tests/kernels/test_operator.py", "tests/test_distributed.py", "tests/train/test_launch.py")
"""Named, since pytest would import the others too, with what they need."""
LIMIT_S, SAVING_S = 470.0, 40.0
"""Of a part; so long before, it is told to save what it has."""
GOES_ON = 75
"""The exit code of a part that has saved and is to be called again."""
LEAST_S = 90.0
"""Where less is left, no part begins."""
SMALL = (
    "--encoder.layers 1 1 1 1 --encoder.channels 8 8 8 8 --method.hidden-dim 16 --method.projection-dim 8 "
    "--batch-size 16 --data.size 32 --device cpu --compile off"
).split()
"""Flags that make every training part one of seconds on a CPU (--small)."""


@dataclass(frozen=True)
class Part:
    """One command.

    needs: the folder it cannot do without, "cifar" or "photos".  results: its flag for them, or "".  goes_on: SIGTERM
    makes it save, and the next call goes on.
    """

    name: str
    command: tuple[str, ...]
    needs: str = ""
    results: str = "--results"
    goes_on: bool = False


def parts(args: argparse.Namespace) -> list[Part]:
    """All parts, in the order in which a first eight minutes should answer questions."""
    small = SMALL if args.small else []
    windows = ["--windows", "2", "--seconds", "0.2"] if args.small else []
    few = windows or ["--windows", "3", "--limit-s", "240"]
    cifar = ["--source.name", "folder", "--source.root", str(args.cifar), "--data.backend", "resident", *small]
    backend = [] if data.has_dali() else ["--data.backend", "torchvision"]
    photos = ["--source.name", "folder", "--source.root", str(args.photos), *backend, *small]
    memory = ["--source.name", "synthetic", "--data.backend", "synthetic", *small]
    sizes = [[], []] if args.small else [["--data.size", "32"], ["--data.size", "224"]]
    step = [sys.executable, str(HERE / "bench_step.py")]
    timed_step = [*step, *(windows or ["--windows", "7", "--limit-s", "240"])]
    resnet50 = ["simclr_imagenet", "--batch-size", "512"]
    loss = [sys.executable, str(HERE / "bench_nt_xent.py"), *(windows or ["--seconds", "0.5", "--limit-s", "60"])]

    def batches(*sizes: str) -> list[str]:
        return ["--batch-sizes", "64", "--memory-at", "--no-compile"] if args.small else ["--batch-sizes", *sizes]

    found = [
        Part("kernels", (*_pytest(args), "-m", "not slow and not gpu", str(ROOT / "tests/kernels")), results=""),
        Part("tests", (*_pytest(args), "-m", "gpu", *(str(ROOT / path) for path in GPU_TESTS)), results=""),
        Part("nt_xent", (*loss, *batches("65536", "4096"))),
        Part("step_32px", (*timed_step, "simclr_cifar10", *memory, *sizes[0])),
        Part("step_224px", (*timed_step, *resnet50, "--batch-norm", "local", *memory, *sizes[1])),
        Part("step_224px_sync", (*timed_step, *resnet50, "--batch-norm", "sync", *memory, *sizes[1])),
        *_two_gpus(args, memory),
        Part("nt_xent_small", (*loss, *batches("512", "2048", "16384"))),
        Part("loader_32px", (*step, *few, "simclr_cifar10", *cifar), "cifar"),
        Part("loader_224px", (*step, *few, *resnet50, *([] if small else ["--batch-size", "256"]), *photos), "photos"),
        _trained(args, "simclr", "0.848", cifar),
        _trained(args, "byol", "0.868", cifar),
    ]
    return [part for part in found if not args.parts or part.name in args.parts]


def _pytest(args: argparse.Namespace) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *["--collect-only"] * args.small]


def _two_gpus(args: argparse.Namespace, memory: list[str]) -> list[Part]:
    """What a second GPU enables: NCCL."""
    if torch.cuda.device_count() < 2 and not args.small:
        return []
    sizes = ["--world-sizes", "1", "2", "--rounds", "1", "--window-steps", "2"] if args.small else ["--rounds", "1"]
    verify = [sys.executable, "-m", "sslx", "verify", *["simclr"] * args.small, "--ranks", "2"]
    scaling = [sys.executable, str(HERE / "bench_scaling.py"), *sizes, "simclr_imagenet", "--batch-size", "512"]
    return [
        Part("verify_nccl", (*verify, "--device", "cpu" if args.small else "cuda"), results=""),
        Part("scaling", (*scaling, *memory)),
    ]


def _trained(args: argparse.Namespace, method: str, knn: str, cifar: list[str]) -> Part:
    """A recipe to its end, in as many calls as that takes; its starts are a part of its time."""
    steps = ["--steps", "4"] if args.small else ["--checkpoint.every", "2000"]
    goal = [] if args.small else ["--knn-at-least", knn]
    script = [sys.executable, str(HERE / "bench_accuracy.py"), "--seeds", "0", "--limit-s", "600", *goal]
    recipe = [f"{method}_cifar10", *cifar, *steps, "--runs", str(args.runs), "--online.every", "0"]
    return Part(f"{method}_200_epochs", (*script, *recipe), "cifar", goes_on=True)


def absolute(path: str) -> Path:
    """Of a path given where the suite was started: its parts run in the repository."""
    return Path(path).resolve()


def state(part: Part, out: Path) -> dict[str, Any]:
    """How it ended last time; empty where it has not run."""
    path = out / f"{part.name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def run(part: Part, out: Path, limit_s: float) -> dict[str, Any]:
    """Run it, at most so long, and write down how it ended.  Its processes are all ended with it."""
    command = [*part.command]
    if part.results:
        results = out / f"{part.name}.jsonl"
        results.unlink(missing_ok=True)  # of a try that failed
        command[2:2] = [part.results, str(results)]
    start = time.perf_counter()
    with (out / f"{part.name}.log").open("a" if part.goes_on else "w") as log:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        environ = os.environ | {"PYTHONPATH": paths.rstrip(os.pathsep), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environ, cwd=ROOT
        )
        code = _wait(process, limit_s, part.goes_on)
    ended = {"part": part.name, "code": code, "seconds": round(time.perf_counter() - start, 1), "command": command}
    (out / f"{part.name}.json").write_text(json.dumps({**ended, **measure.stamp()}) + "\n")
    return ended


def _wait(process: subprocess.Popen[bytes], limit_s: float, saves: bool) -> int:
    """Its exit code, 124 where its time was over."""
    try:
        if saves:
            try:
                return process.wait(max(0.0, limit_s - SAVING_S))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGTERM)
                limit_s = SAVING_S
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=absolute, help="CIFAR-10 as images in class folders")
    parser.add_argument("--photos", type=absolute, help="photos, in class folders or not")
    parser.add_argument("--out", type=absolute, default=HERE / "results" / "gpu")
    parser.add_argument("--runs", type=absolute, default=absolute("runs"))
    parser.add_argument("--parts", nargs="+", default=[], help="only these")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="of a part")
    parser.add_argument("--for-s", type=float, default=float("inf"), help="of all: no part begins that would not end")
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--table", action="store_true", help="run nothing, print what has been measured")
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU: whether the suite works")
    args = parser.parse_args(argv)
    wanted = parts(args)
    if args.table:
        print(gpu_table.table([part.name for part in wanted], args.out))
        return 0
    idle = args.list or not (torch.cuda.is_available() or args.small)
    if idle and not args.list:
        print("no GPU here: this is what would run")
    args.out.mkdir(parents=True, exist_ok=True)
    return _run_all(wanted, args, idle)


def _run_all(wanted: list[Part], args: argparse.Namespace, idle: bool) -> int:
    """Run what is not done, or say what would run; the exit code."""
    started, codes = time.perf_counter(), list[int]()
    for part in wanted:
        before = state(part, args.out)
        limit_s = min(args.limit_s, args.for_s - (time.perf_counter() - started))
        if before.get("code") == 0:
            print(f"{part.name:20} done in {before['seconds']:.0f} s")
        elif part.needs and getattr(args, part.needs) is None:
            print(f"{part.name:20} left out: needs --{part.needs} DIR")
        elif idle:
            print(f"{part.name:20} {shlex.join(part.command)}")
        elif limit_s < min(args.limit_s, LEAST_S):
            print(f"{part.name:20} left for the next time: {max(0.0, limit_s):.0f} s remain")
            codes.append(GOES_ON)
        else:
            print(f"{part.name:20} runs, {limit_s:.0f} s at most", flush=True)
            ended = run(part, args.out, limit_s)
            codes.append(ended["code"])
            what = f"FAILED with {ended['code']}, see {args.out / part.name}.log"
            what = {0: "done", GOES_ON: "has saved, and goes on the next time"}.get(ended["code"], what)
            print(f"{part.name:20} {what} in {ended['seconds']:.0f} s", flush=True)
    if set(codes) - {0, GOES_ON}:
        return 1
    return GOES_ON if GOES_ON in codes else 0


if __name__ == "__main__":
    sys.exit(main())
