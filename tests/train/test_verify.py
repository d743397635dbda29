"""``sslx verify``: real processes, every method, and a planted bug that it finds."""

import math
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import sslx
from kit.processes import SSLX
from sslx import cli, methods
from sslx.train import verify

ROOT = Path(sslx.__file__).parents[1]
SOME = ["dino", "simclr"]
"""Methods that CI verifies.  The losses of all methods are compared on 2 and 3 ranks by tests/methods."""


def run(tree: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SSLX, "verify", *argv], cwd=tree, capture_output=True, text=True, timeout=1700)


def copy_of_the_package(tmp_path: Path) -> Path:
    """A tree from which ``python -m sslx`` runs the copy, which a test may change."""
    for folder in ("sslx", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "sslx_kernels").symlink_to(tmp_path / "kernels" / "sslx_kernels")
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("names", "world_sizes"), [(SOME, [3]), pytest.param(methods.available(), [2, 3], marks=pytest.mark.soak)]
)
def test_every_method_is_the_same_at_any_world_size(names: Sequence[str], world_sizes: list[int]) -> None:
    done = run(ROOT, *names, "--device", "cpu", "--ranks", *map(str, world_sizes))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equivalent (tolerance 1e-10 in fp64, 1e-05 in fp32; fp32: one step)" in done.stdout
    for name in names:
        rows = [line for line in done.stdout.splitlines() if line.startswith(f"│ {name} ")]
        assert len(rows) == 3 * len(world_sizes) * len(methods.encoders(name)), done.stdout
        assert all(row.endswith("ok │") for row in rows)


def with_another_simclr(tmp_path: Path, right: str, wrong: str) -> subprocess.CompletedProcess[str]:
    """``sslx verify simclr`` of a copy in which the lines of SimCLR's loss are others."""
    tree = copy_of_the_package(tmp_path)
    file = tree / "sslx" / "methods" / "simclr.py"
    text = file.read_text()
    assert text.count(right) == 1
    file.write_text(text.replace(right, wrong) + "\n\nfrom sslx import distributed\n")
    return run(tree, "simclr", "--ranks", "2", "--device", "cpu")


@pytest.mark.slow
def test_a_gradient_of_one_wth_is_found(tmp_path: Path) -> None:
    """lightly #1977's bug: the loss is right, and every gradient is a W-th of what it should be."""
    right = "losses.nt_xent(z1, z2, self.config.temperature)"
    share = f"{right} / distributed.world_size()"
    done = with_another_simclr(tmp_path, right, f"{share} + ({right} - {share}).detach()")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "NOT equivalent" in done.stdout
    assert "simclr on a resnet, 2 ranks, fp32 sgd: gradients 5.0e-01 (" in done.stdout
    assert "fp32 sgd: loss" not in done.stdout


@pytest.mark.slow
def test_a_method_that_fails_on_one_rank_only_is_named(tmp_path: Path) -> None:
    right = "        z1, z2 = embedded.compared\n"
    fails = '        if distributed.rank() == 1:\n            raise RuntimeError("planted")\n'
    done = with_another_simclr(tmp_path, right, right + fails)
    assert done.returncode == cli.EXIT_CRASH
    said = "error: simclr on a resnet failed on rank 1 of 2, and not on one process: RuntimeError: planted"
    assert [line for line in done.stderr.splitlines() if line.startswith("error")] == [said]


@pytest.mark.slow
def test_the_readmes_method_is_one_file_that_trains_and_is_the_same_on_three_ranks(tmp_path: Path) -> None:
    readme = (ROOT / "sslx" / "methods" / "README.md").read_text()
    code = readme.split("`sslx/methods/uniformity.py`:\n\n```python\n")[1].split("```")[0]
    assert code.count("\n") < 60
    tree = copy_of_the_package(tmp_path)
    (tree / "sslx" / "methods" / "uniformity.py").write_text(code)
    done = run(tree, "uniformity", "--ranks", "3", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok │") == 3
    recipe = tree / "sslx" / "recipes" / "simclr_digits.toml"
    text = recipe.read_text().replace('name = "simclr"\ntemperature = 0.2\nhidden_dim = 256', 'name = "uniformity"')
    recipe.write_text(text)
    command = [*SSLX, "pretrain", "simclr_digits", "--name", "new", "--steps", "3", "--ranks", "1"]
    trained = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=120)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    lines = (tree / "runs" / "new" / "metrics.jsonl").read_text()
    assert '"uniformity"' in lines


def test_errors_are_relative_to_each_tensor_but_not_to_nothing() -> None:
    a, b = torch.randn(2, 5, dtype=torch.float64).abs() + 1
    truth = [{"a": a, "tiny": b * 1e-3, "zero": b * 1e-30}]
    assert verify.worst(truth, truth, 1e-6) == (0.0, "")
    error, name = verify.worst([{"a": a, "tiny": b * 1.1e-3, "zero": b * 1e-20}], truth, 1e-6)
    assert (round(error, 9), name) == (0.1, "tiny")
    assert math.isnan(verify.worst([{"a": a * math.nan, "tiny": b, "zero": b}], truth, 1e-6)[0])
    assert math.isnan(verify.worst([{"a": a, "tiny": b}], truth, 1e-6)[0])
    assert verify.worst([{"a": a, "tiny": b}], truth, 1e-6)[1] == "zero"
    assert math.isnan(verify.worst([], truth, 1e-6)[0])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["simcrl"], "did you mean simclr?"),
        (["--ranks", "5"], "2 or more, and a divisor of 24, got 5"),
        (["--ranks", "1"], "2 or more, and a divisor of 24, got 1"),
        (["--ranks", "2", "--device", "cuda"], "as many GPUs"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in argv and torch.cuda.device_count() > 1:
        pytest.skip("there are GPUs")
    assert cli.main(["verify", *argv]) not in (0, 1)
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1]
    assert said[-1].startswith("error: ")
