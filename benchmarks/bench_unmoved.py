"""Whether a change has moved a number: the first losses of recipes and the weights after them, beside another commit.

    python benchmarks/run.py unmoved COMMIT [RECIPE ...]     (by default all recipes *_digits and *_cifar10_cpu)

Each recipe trains for 20 steps in a process of each tree, on the same machine and the same images: digits come with
scikit-learn, and the CIFAR-10 recipes read PNG files that this benchmark draws.  It compares the 20 losses, to the last
bit, and the digests of all tensors of the method's state after them, whatever their names.  Fails if any differ.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import images
import numpy as np
import other_tree
from harness import Session, benchmark, option
from PIL import Image

from sslx import config

STEPS = 20
FLAGS = f"--steps {STEPS} --checkpoint.every 0 --log.every 1 --online.every 0 --health.every 0 --device cpu".split()
PRETRAIN = f"{other_tree.PRELUDE}\nsys.exit(cli.main(['pretrain', *flags]))"
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
    """Draw 600 pictures of 32 px in 10 class folders: blurred noise in the colors of its class."""
    generator = np.random.default_rng(0)
    for label in range(10):
        (folder / f"class_{label}").mkdir(parents=True)
        color = generator.integers(0, 200, 3)
        for i in range(60):
            coarse = (color + generator.integers(0, 56, (8, 8, 3))).astype(np.uint8)
            picture = Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC)
            picture.save(folder / f"class_{label}" / f"{i}.png")


def numbers(tree: Path, recipe: str, image_folder: Path, runs: Path) -> tuple[list[float], list[str]]:
    """The first losses of a recipe by the code of ``tree``, and digests of the weights after them."""
    flags = [recipe, *FLAGS, "--runs", str(runs), "--name", recipe]
    if not recipe.endswith("_digits"):
        flags += images.flags("folder", image_folder)

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", *arguments],
            cwd=tree,
            env=other_tree.environ(tree),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{tree}, {recipe}:\n{done.stdout[-500:]}{done.stderr[-1500:]}")
        return done.stdout

    python(PRETRAIN, *flags)
    lines = (runs / recipe / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in line]
    return losses, sorted(python(DIGESTS, str(runs / recipe)).split())


@benchmark(
    option("commit", help="the commit to compare with"),
    option("recipes", nargs="*", help="recipes to train"),
)
def run(session: Session) -> bool:
    commit, moved = session.options.commit, list[str]()
    all_recipes = [name for name in config.recipes() if name.endswith(("_digits", "_cifar10_cpu"))]
    with other_tree.checkout(commit) as other, tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        draw_images(folder / "images")
        for recipe in session.options.recipes or all_recipes:
            (losses, weights), (other_losses, other_weights) = (
                numbers(tree, recipe, folder / "images", folder / f"runs_{tree.name}")
                for tree in (other_tree.HERE, other)
            )
            assert len(losses) == STEPS, f"{recipe} has logged {len(losses)} losses"
            assert len(set(losses)) > STEPS // 2, f"{recipe} does not train"
            pairs = enumerate(zip(losses, other_losses, strict=True))
            num_equal = next((i for i, (loss, other_loss) in pairs if loss != other_loss), STEPS)
            same = weights == other_weights
            print(f"{recipe}: {num_equal} of {STEPS} losses equal, weights {'equal' if same else 'DIFFER'}", flush=True)
            if num_equal < STEPS or not same:
                moved.append(recipe)
            session.record(recipe=recipe, other_commit=commit, equal_losses=num_equal, equal_weights=same,
                           num_tensors=len(weights))  # fmt: skip
    if moved:
        print(f"moved: {', '.join(moved)}")
    return not moved
