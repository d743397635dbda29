"""Everything that needs a GPU, as parts that each end in under eight minutes and leave a results file of their own.

    python benchmarks/gpu_suite.py --cifar DIR --photos DIR        (folders: train/CLASS/*, test/CLASS/*; any images)
    python benchmarks/gpu_suite.py --list                          (what would run, and what has)

Parts that are done are left out, so that a machine that is lent for minutes at a time gets through all of them; a part
that trains resumes its run.  What a part measured is in OUT/PART.jsonl, what it printed in OUT/PART.log, how it ended
in OUT/PART.json; checkpoints stay in --runs.  Without a GPU it prints what it would run.  Without DALI the loaders are
torchvision's; CIFAR-10 is held in the GPU's memory either way.  wandb, submitit and lightly are not needed, tyro, timm
and rich are, and pytest for the tests.
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

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # a copy that is not installed

from sslx import data, measure  # noqa: E402

GPU_TESTS = ("tests/kernels/test_operator.py", "tests/test_distributed.py", "tests/train/test_launch.py")
"""Named, since pytest would import the others too, with what they need."""
LIMIT_S = 470
SMALL = (
    "--encoder.layers 1 1 1 1 --encoder.channels 8 8 8 8 --method.hidden-dim 16 --method.projection-dim 8 "
    "--batch-size 16 --data.size 32 --device cpu --compile off"
).split()
"""Flags that make every training part one of seconds on a CPU (--small)."""


@dataclass(frozen=True)
class Part:
    """One command.  needs: the folder it cannot do without, "cifar" or "photos".  results: its flag for them, or ""."""

    name: str
    command: tuple[str, ...]
    needs: str = ""
    results: str = "--results"


def parts(args: argparse.Namespace) -> list[Part]:
    """All parts, the ones that others' figures rest on first."""
    small = SMALL if args.small else []
    backend = [] if data.has_dali() else ["--data.backend", "torchvision"]
    windows = ["--windows", "2", "--seconds", "0.2"] if args.small else []
    cifar = ["--data.source", "folder", "--data.root", str(args.cifar), "--data.backend", "resident", *small]
    photos = ["--data.source", "folder", "--data.root", str(args.photos), *backend, *small]
    memory = ["--data.source", "synthetic", "--data.backend", "synthetic", *small]
    step = [sys.executable, str(HERE / "bench_step.py"), *windows]
    resnet50 = ["simclr_imagenet", "--batch-size", "512", "--batch-norm", "local"]

    def recipe(method: str) -> list[str]:
        steps = ["--steps", "4"] if args.small else []
        return [f"{method}_cifar10", *cifar, *steps, "--runs", str(args.runs), "--online.every", "0"]

    def goal(knn: str) -> list[str]:
        return [] if args.small else ["--knn-at-least", knn]

    python, tests = [sys.executable, "-m"], [str(ROOT / path) for path in GPU_TESTS]
    loss = [sys.executable, str(HERE / "bench_nt_xent.py")]
    trained = [sys.executable, str(HERE / "bench_accuracy.py"), "--seeds", "0", "--limit-s", "480"]
    found = [
        Part(
            "tests",
            (*python, "pytest", "-q", *(["--collect-only"] if args.small else ["-m", "gpu"]), *tests),
            results="",
        ),
        Part("nt_xent", (*loss, *(windows or ["--seconds", "0.5"]), *_small_loss(args))),
        Part("step_32px", (*step, "simclr_cifar10", *memory, *(_size(32) if not small else []))),
        Part("step_224px", (*step, *resnet50, *memory, *(_size(224) if not small else []))),
        Part("loader_32px", (*step, "simclr_cifar10", *cifar), "cifar"),
        Part("loader_224px", (*step, *resnet50, *_few(args), *photos), "photos"),
        Part("simclr_200_epochs", (*trained, *goal("0.848"), *recipe("simclr")), "cifar"),
        Part("byol_200_epochs", (*trained, *goal("0.868"), *recipe("byol")), "cifar"),
    ]
    if torch.cuda.device_count() > 1 or args.small:
        sizes = ["--world-sizes", "1", "2", "--rounds", "1", "--window-steps", "2"] if args.small else []
        scaling = [sys.executable, str(HERE / "bench_scaling.py"), *sizes, "simclr_imagenet"]
        found.append(Part("scaling", (*scaling, "--batch-size", "512", *memory)))
    return [part for part in found if not args.parts or part.name in args.parts]


def absolute(path: str) -> Path:
    """Of a path given where the suite was started: its parts run in the repository."""
    return Path(path).resolve()


def _size(pixels: int) -> list[str]:
    return ["--data.size", str(pixels)]


def _few(args: argparse.Namespace) -> list[str]:
    """A batch that a folder of few hundred photos fills."""
    return [] if args.small else ["--batch-size", "256"]


def _small_loss(args: argparse.Namespace) -> list[str]:
    return ["--batch-sizes", "64", "--memory-at", "--no-compile"] if args.small else []


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
    with (out / f"{part.name}.log").open("w") as log:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        environ = os.environ | {"PYTHONPATH": paths.rstrip(os.pathsep)}
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environ, cwd=ROOT
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    ended = {"part": part.name, "code": code, "seconds": round(time.perf_counter() - start, 1), "command": command}
    (out / f"{part.name}.json").write_text(json.dumps({**ended, **measure.stamp()}) + "\n")
    return ended


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=absolute, help="CIFAR-10 as images in class folders")
    parser.add_argument("--photos", type=absolute, help="photos, in class folders or not")
    parser.add_argument("--out", type=absolute, default=HERE / "results" / "gpu")
    parser.add_argument("--runs", type=absolute, default=absolute("runs"))
    parser.add_argument("--parts", nargs="+", default=[], help="only these")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="of a part")
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU: whether the suite works")
    args = parser.parse_args(argv)
    wanted = parts(args)
    idle = args.list or not (torch.cuda.is_available() or args.small)
    if idle and not args.list:
        print("no GPU here: this is what would run")
    args.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for part in wanted:
        before = state(part, args.out)
        if before.get("code") == 0:
            print(f"{part.name:20} done in {before['seconds']:.0f} s")
        elif part.needs and getattr(args, part.needs) is None:
            print(f"{part.name:20} left out: needs --{part.needs} DIR")
        elif idle:
            print(f"{part.name:20} {shlex.join(part.command)}")
        else:
            print(f"{part.name:20} runs, {args.limit_s:.0f} s at most", flush=True)
            ended = run(part, args.out, args.limit_s)
            failed += ended["code"] != 0
            what = "done" if ended["code"] == 0 else f"FAILED with {ended['code']}, see {args.out / part.name}.log"
            print(f"{part.name:20} {what} in {ended['seconds']:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
