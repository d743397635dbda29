"""Everything that needs a GPU, as parts that each end in under eight minutes and leave a results file of their own.

    python benchmarks/gpu_suite.py --cifar DIR --photos DIR        (DIR with train/CLASS/* and test/CLASS/*; any images)
    python benchmarks/gpu_suite.py --list                          (what would run, and what has run)
    python benchmarks/gpu_suite.py --table                         (what has been measured)

Finished parts are left out, so that a machine that is lent for minutes at a time gets through all of them, the most
important first.  A part that trains saves before its time is over and continues at the next call.  The figures of a
part are in OUT/PART.jsonl, its output in OUT/PART.log, and how it ended in OUT/PART.json; checkpoints stay in --runs.
Without a GPU, the suite prints what it would run.  Exits with 0 if all parts are done, 75 if some must continue, and 1
if one has failed.  It needs torch, timm, rich and, for the parts that train, tyro; for the tests, pytest.  Without DALI
the loaders are torchvision's; CIFAR-10 is held in the GPU's memory in either case.
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
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # for a copy that is not installed

import images  # noqa: E402

from sslx import data  # noqa: E402
from sslx.bench import measure  # noqa: E402

GPU_TESTS = ("tests/gpu", "tests/kernels/test_operator.py", "tests/test_distributed.py", "tests/train/test_launch.py")
"""Named, because pytest would also import all other tests and the packages that they need."""
LIMIT_S, SAVING_S = 470.0, 40.0
"""Longest time of a part, and how long before its end a part that trains is told to save."""
CONTINUES = 75
"""Exit code of a part that has saved and must be called again."""
LEAST_S = 90.0
"""With less time left, no part starts."""
SMALL = (
    "--encoder.layers 1 1 1 1 --encoder.channels 8 8 8 8 --method.hidden-dim 16 --method.projection-dim 8 "
    "--batch-size 16 --data.size 32 --device cpu --compile off"
).split()
"""Flags with which every training part takes seconds on a CPU (--small)."""


@dataclass(frozen=True)
class Part:
    """One command.

    needs: the folder that it requires, "cifar" or "photos".  records: it takes --results.  continues: it saves on
    SIGTERM, and the next call continues.
    """

    name: str
    command: tuple[str, ...]
    needs: str = ""
    records: bool = True
    continues: bool = False


def bench(name: str, *options: str) -> tuple[str, ...]:
    """The command of a benchmark."""
    return (sys.executable, str(HERE / "run.py"), name, *options)


def parts(args: argparse.Namespace) -> list[Part]:
    """All parts, in the order in which the first eight minutes should answer questions."""
    small = SMALL if args.small else []
    windows = ["--windows", "2", "--seconds", "0.2"] if args.small else []
    loading = windows or ["--windows", "3", "--limit-s", "240"]
    cifar = [*images.flags("folder", args.cifar), "--data.backend", "resident", *small]
    backend = [] if data.has_dali() else ["--data.backend", "torchvision"]
    photos = [*images.flags("folder", args.photos), *backend, *small]
    memory = [*images.flags("synthetic"), "--data.backend", "synthetic", *small]
    px32, px224 = ([], []) if args.small else (["--data.size", "32"], ["--data.size", "224"])
    timed = windows or ["--windows", "7", "--limit-s", "240"]
    resnet50 = ["simclr_imagenet", "--batch-size", "512"]
    per_gpu = [] if args.small else ["--batch-size", "256"]

    def loss(*sizes: str) -> tuple[str, ...]:
        if args.small:
            return bench("nt_xent", *windows, "--batch-sizes", "64", "--memory-at", "--no-compile")
        return bench("nt_xent", "--seconds", "0.5", "--limit-s", "60", "--batch-sizes", *sizes)

    all_parts = [
        Part("kernels", (*_pytest(args), "-m", "not slow and not gpu", str(ROOT / "tests/kernels")), records=False),
        Part("tests", (*_pytest(args), "-m", "gpu", *(str(ROOT / path) for path in GPU_TESTS)), records=False),
        Part("nt_xent", loss("65536", "4096")),
        Part("step_32px", bench("step", *timed, "simclr_cifar10", *memory, *px32)),
        Part("step_224px", bench("step", *timed, *resnet50, "--batch-norm", "local", *memory, *px224)),
        Part("step_224px_sync", bench("step", *timed, *resnet50, "--batch-norm", "sync", *memory, *px224)),
        *_two_gpus(args, memory),
        Part("nt_xent_small", loss("512", "2048", "16384")),
        Part("loader_32px", bench("step", *loading, "simclr_cifar10", *cifar), "cifar"),
        Part("loader_224px", bench("step", *loading, *resnet50, *per_gpu, *photos), "photos"),
        _trained(args, "simclr", "0.848", cifar),
        _trained(args, "byol", "0.868", cifar),
    ]
    return [part for part in all_parts if not args.parts or part.name in args.parts]


def _pytest(args: argparse.Namespace) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *["--collect-only"] * args.small]


def _two_gpus(args: argparse.Namespace, memory: list[str]) -> list[Part]:
    """The parts that need a second GPU, for NCCL."""
    if torch.cuda.device_count() < 2 and not args.small:
        return []
    sizes = ["--world-sizes", "1", "2", "--rounds", "1", "--window-steps", "2"] if args.small else ["--rounds", "1"]
    verify = [sys.executable, "-m", "sslx", "verify", *["simclr"] * args.small, "--ranks", "2"]
    scaling = bench("scaling", *sizes, "simclr_imagenet", "--batch-size", "512", *memory)
    return [
        Part("verify_nccl", (*verify, "--device", "cpu" if args.small else "cuda"), records=False),
        Part("scaling", scaling),
    ]


def _trained(args: argparse.Namespace, method: str, knn: str, cifar: list[str]) -> Part:
    """Train a recipe to its end, in as many calls as it takes; all of its starts count as its time."""
    steps = ["--steps", "4"] if args.small else ["--checkpoint.every", "2000"]
    goal = [] if args.small else ["--knn-at-least", knn]
    recipe = [f"{method}_cifar10", *cifar, *steps, "--runs", str(args.runs), "--online.every", "0"]
    command = bench("accuracy", "--seeds", "0", "--limit-s", "600", *goal, *recipe)
    return Part(f"{method}_200_epochs", command, "cifar", continues=True)


def state(part: Part, out: Path) -> dict[str, Any]:
    """How a part ended last time; empty if it has not run."""
    path = out / f"{part.name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def run(part: Part, out: Path, limit_s: float) -> dict[str, Any]:
    """Run a part for at most ``limit_s``, end all its processes, and write down how it ended."""
    command = [*part.command]
    if part.records:
        results = out / f"{part.name}.jsonl"
        results.unlink(missing_ok=True)  # from a call that failed
        command += ["--results", str(results)]
    start = time.perf_counter()
    with (out / f"{part.name}.log").open("a" if part.continues else "w") as log:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        environ = os.environ | {"PYTHONPATH": paths.rstrip(os.pathsep), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environ, cwd=ROOT
        )
        code = _wait(process, limit_s, part.continues)
    ended = {"part": part.name, "code": code, "seconds": round(time.perf_counter() - start, 1), "command": command}
    (out / f"{part.name}.json").write_text(json.dumps({**ended, **measure.stamp()}) + "\n")
    return ended


def _wait(process: subprocess.Popen[bytes], limit_s: float, saves: bool) -> int:
    """The exit code of a process, or 124 if its time was over."""
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

    def absolute(path: str) -> Path:
        return Path(path).resolve()  # its parts run in the repository

    parser.add_argument("--cifar", type=absolute, help="CIFAR-10 as images in class folders")
    parser.add_argument("--photos", type=absolute, help="photos, in class folders or not")
    parser.add_argument("--out", type=absolute, default=HERE / "results" / "gpu")
    parser.add_argument("--runs", type=absolute, default=absolute("runs"))
    parser.add_argument("--parts", nargs="+", default=[], help="run only these")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="longest time of a part")
    parser.add_argument(
        "--for-s",
        type=float,
        default=float("inf"),
        help="longest time of the call: no part starts that would not end in it",
    )
    parser.add_argument("--list", action="store_true", help="print what would run, and run nothing")
    parser.add_argument("--table", action="store_true", help="print what has been measured, and run nothing")
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU, to test the suite")
    args = parser.parse_args(argv)
    selected = parts(args)
    if args.table:
        print(gpu_table.table([part.name for part in selected], args.out))
        return 0
    idle = args.list or not (torch.cuda.is_available() or args.small)
    if idle and not args.list:
        print("this machine has no GPU; with one, this would run:")
    args.out.mkdir(parents=True, exist_ok=True)
    return _run_all(selected, args, idle)


def _run_all(selected: list[Part], args: argparse.Namespace, idle: bool) -> int:
    """Run the parts that are not done, or print what would run; return the exit code."""
    started, codes = time.perf_counter(), list[int]()
    for part in selected:
        before = state(part, args.out)
        limit_s = min(args.limit_s, args.for_s - (time.perf_counter() - started))
        if before.get("code") == 0:
            print(f"{part.name:20} done in {before['seconds']:.0f} s")
        elif part.needs and getattr(args, part.needs) is None:
            print(f"{part.name:20} left out: it needs --{part.needs} DIR")
        elif idle:
            print(f"{part.name:20} {shlex.join(part.command)}")
        elif limit_s < min(args.limit_s, LEAST_S):
            print(f"{part.name:20} left for the next call: {max(0.0, limit_s):.0f} s remain")
            codes.append(CONTINUES)
        else:
            print(f"{part.name:20} runs for at most {limit_s:.0f} s", flush=True)
            ended = run(part, args.out, limit_s)
            codes.append(ended["code"])
            outcome = f"FAILED with {ended['code']}, see {args.out / part.name}.log"
            outcome = {0: "done", CONTINUES: "has saved, and continues at the next call"}.get(ended["code"], outcome)
            print(f"{part.name:20} {outcome} in {ended['seconds']:.0f} s", flush=True)
    if set(codes) - {0, CONTINUES}:
        return 1
    return CONTINUES if CONTINUES in codes else 0


if __name__ == "__main__":
    sys.exit(main())
