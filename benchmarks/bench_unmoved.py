"""Whether a change has moved a number: the first losses of recipes and the weights after them, beside another commit.

    python benchmarks/bench_unmoved.py COMMIT [RECIPE ...]      default: all *_digits and *_cifar10_cpu recipes

Each recipe trains for 20 steps in a process of each tree, on the same machine and images: digits come with
scikit-learn, and the CIFAR-10 recipes read PNG files that this script draws.  Compared are the 20 losses, to the last
bit, and every tensor of the method's state after them, by its digest, whatever its name.  Fails where one differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from sslx import config
from sslx.bench import measure

HERE = Path(__file__).parents[1]
RESULTS = HERE / "benchmarks" / "results" / "unmoved.jsonl"
STEPS = 20
FLAGS = f"--steps {STEPS} --checkpoint.every 0 --log.every 1 --online.every 0 --health.every 0 --device cpu".split()
_FOLDER = {"source": ["--source.name", "folder"], "data": ["--data.source", "folder"]}
DIGESTS = """
import hashlib, sys, torch
from pathlib import Path
try:
    from sslx.runs import checkpoint
except ImportError:
    from sslx import checkpoint
state = checkpoint.load(Path(sys.argv[1]))["method"]
for value in state.values():
    if value.is_floating_point() and value.numel() > 1:
        print(hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()[:16], *value.shape, sep="x")
"""


def draw_images(folder: Path) -> None:
    """600 pictures of 32 px in 10 class folders: blurred noise in the colors of its class."""
    generator = np.random.default_rng(0)
    for label in range(10):
        (folder / f"class_{label}").mkdir(parents=True)
        color = generator.integers(0, 200, 3)
        for i in range(60):
            coarse = (color + generator.integers(0, 56, (8, 8, 3))).astype(np.uint8)
            picture = Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC)
            picture.save(folder / f"class_{label}" / f"{i}.png")


def numbers(tree: Path, recipe: str, images: Path, runs: Path) -> tuple[list[float], list[str]]:
    """The losses of the first steps of a recipe by the code of ``tree``, and digests of the weights after them."""
    environ = os.environ | {"PYTHONPATH": f"{tree}:{tree / 'kernels'}", "OMP_NUM_THREADS": "1"}
    argv = [recipe, *FLAGS, "--runs", str(runs), "--name", recipe]
    if not recipe.endswith("_digits"):
        section = "source" if (tree / "sslx" / "by_name.py").exists() else "data"  # as it was called once
        argv += [f"--{section}.root", str(images), *_FOLDER[section]]

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=tree, env=environ, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{tree}: {' '.join(command)[:200]}\n{done.stdout[-500:]}{done.stderr[-1500:]}")
        return done.stdout

    run("-m", "sslx", "pretrain", *argv)
    lines = (runs / recipe / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in line]
    return losses, sorted(run("-c", DIGESTS, str(runs / recipe)).split())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the commit to compare with")
    parser.add_argument("recipes", nargs="*")
    args = parser.parse_args()
    recipes = args.recipes or [name for name in config.recipes() if name.endswith(("_digits", "_cifar10_cpu"))]
    moved: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        folder, old = Path(place), Path(place) / "old"
        draw_images(folder / "images")
        subprocess.run(["git", "-C", HERE, "worktree", "add", "--detach", "--quiet", old, args.commit], check=True)
        try:
            for recipe in recipes:
                (losses, weights), (old_losses, old_weights) = (
                    numbers(tree, recipe, folder / "images", folder / f"runs_{tree.name}") for tree in (HERE, old)
                )
                assert len(losses) == STEPS, f"{recipe} has logged {len(losses)} losses"
                assert len(set(losses)) > STEPS // 2, f"{recipe} does not train"
                equal = (losses == old_losses, weights == old_weights)
                first = next((i for i, (a, b) in enumerate(zip(losses, old_losses, strict=True)) if a != b), STEPS)
                print(
                    f"{recipe}: {first} of {STEPS} losses equal, weights {'equal' if equal[1] else 'DIFFER'}",
                    flush=True,
                )
                moved += [recipe] * (not all(equal))
                record = {"benchmark": "unmoved", "recipe": recipe, "other_commit": args.commit, "equal_losses": first}
                measure.append(RESULTS, {**record, "equal_weights": equal[1], "num_tensors": len(weights)})
        finally:
            subprocess.run(["git", "-C", HERE, "worktree", "remove", "--force", old], check=False)
    if moved:
        print(f"moved: {', '.join(moved)}")
    return 1 if moved else 0


if __name__ == "__main__":
    sys.exit(main())
