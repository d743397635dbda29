"""``sslx resume``, ``sweep``, ``methods``, ``recipes`` and the help: real commands, as a user types them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslx import cli, config, methods
from sslx.config import flags
from sslx.errors import ConfigError, MissingInput

ROOT = Path(__file__).parents[2]
TINY = [
    "--source.name", "synthetic", "--source.num-samples", "32", "--data.size", "16", "--data.backend", "torchvision",
    "--data.threads", "0", "--batch-size", "8", "--encoder.layers", "1", "1", "1", "1", "--encoder.channels", "8", "8",
    "8", "8", "--method.hidden-dim", "16", "--steps", "2", "--precision", "fp32", "--online.every", "0",
    "--compile", "off",
]  # fmt: skip


def sslx(*argv: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sslx", *map(str, argv)]
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize(
    "argv",
    [["pretrain", "--help"], ["pretrain", "simclr_digits", "--help-all"], ["pretrain", "--optim.lrr", "1"],
     ["pretrain", "simclr_digit"], ["probe", "--help"], ["plot", "--help"], ["verify", "--help"], ["methods"],
     ["recipes"], ["resume", "--help"], ["sweep", "--help"], ["jobs"]],
    ids=" ".join,
)  # fmt: skip
def test_help_lists_and_wrong_flags_need_neither_torch_nor_numpy(argv: list[str], tmp_path: Path):
    code = (
        "import sys; from sslx import cli; code = cli.main(sys.argv[1:]); "
        "heavy = {'torch', 'numpy', 'timm', 'nvidia.dali', 'wandb', 'PIL'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    environ = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_short_help_shows_a_recipes_values(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["pretrain", "byol_digits", "--help"]) == 0
    text = capsys.readouterr().out
    assert "(here: byol)" in text
    assert "(here: 60)" in text
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_no_line_of_the_short_help_is_wider_than_the_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(["pretrain", "--help"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= columns


def test_all_methods_are_choices_and_have_a_line(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:] if line[:1].strip()][: len(methods.available())] == list(
        methods.available()
    )
    assert cli.main(["pretrain", "--help-all"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(f"{name}," in text or f"{name}}}" in text for name in methods.available())


def test_all_recipes_have_a_line(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["recipes"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in flags.recipes())
    assert "kNN 38.1 %, linear 44.1 %" in text


def test_a_run_goes_on_by_any_natural_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    first = sslx("pretrain", *TINY, "--name", "a", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    run = tmp_path / "runs" / "a"
    weights = (run / "checkpoints" / "step_2" / "encoder.safetensors").read_bytes()
    for argv in (
        ["resume", "runs/a"],
        ["pretrain", "--resume", "runs/a"],
        ["pretrain", "--resume=runs/a"],
        ["pretrain", "runs/a", "--resume", "auto"],
        ["pretrain", "--name", "a", "--resume", "auto"],
    ):
        assert cli.main([*argv, "--log.every", "1"]) == 0, argv
    assert (run / "checkpoints" / "step_2" / "encoder.safetensors").read_bytes() == weights
    moved = tmp_path / "elsewhere" / "b"
    moved.parent.mkdir()
    run.rename(moved)
    done = sslx("resume", moved, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "runs" / "a").exists()


def test_what_is_no_run_is_said_so(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--resume takes auto, no or the folder of a run, and .* holds no run"):
        config.load(["--resume", str(tmp_path)])
    with pytest.raises(
        ConfigError, match=r"is a folder and no run: to train on the images in it, sslx pretrain --source"
    ):
        config.load([str(tmp_path)])
    with pytest.raises(
        MissingInput, match=r"no recipe 'simclr_digit': did you mean simclr_digits\? sslx recipes lists"
    ):
        config.load(["simclr_digit"])


def test_a_sweep_trains_all_runs_and_goes_on(tmp_path: Path):
    (tmp_path / "lrs.toml").write_text('[grid]\n"optim.lr" = [0.1, 0.2]\n')
    first = sslx("sweep", "lrs.toml", *TINY, "--name", "s", cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.count("done: 2 steps") == 2
    for lr in ("0.1", "0.2"):
        saved = json.loads((tmp_path / "runs" / f"s-lr={lr}" / "config.json").read_text())
        assert saved["optim"]["lr"] == float(lr)
        assert json.loads((tmp_path / "runs" / f"s-lr={lr}" / "status.json").read_text())["state"] == "done"
    again = sslx("sweep", "lrs.toml", *TINY, "--name", "s", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count(" is done") == 2


@pytest.mark.slow
def test_a_sweep_says_which_run_failed_and_trains_the_others(tmp_path: Path):
    (tmp_path / "mixed.toml").write_text('[[run]]\n"method.queue" = 1\n')
    wrong = sslx("sweep", "mixed.toml", *TINY, cwd=tmp_path)
    assert wrong.returncode == 64  # before anything is trained
    (tmp_path / "sizes.toml").write_text('[grid]\n"batch_size" = [64, 8]\n')  # 64 of 32 images
    done = sslx("sweep", "sizes.toml", *TINY, "--name", "s", cwd=tmp_path)
    assert done.returncode == 64, done.stdout + done.stderr
    assert "s-batch_size=8" in done.stdout
    assert json.loads((tmp_path / "runs" / "s-batch_size=8" / "status.json").read_text())["state"] == "done"


@pytest.mark.slow
def test_a_name_in_place_of_a_runs_folder_and_an_existing_run(tmp_path: Path):
    """Both are answered at once, before the encoder is built."""
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.json").write_text("{}")
    (tmp_path / "photos").mkdir()
    for command in ("probe", "plot", "resume"):
        done = sslx(command, "mine", cwd=tmp_path)
        assert "did you mean runs/mine?" in done.stderr
        assert done.returncode in (64, 66)
    done = sslx("probe", "photos", cwd=tmp_path)
    assert "no checkpoint at photos" in done.stderr
    assert "--source.root" in done.stderr
    done = sslx("pretrain", *TINY, "--name", "mine", cwd=tmp_path)
    assert done.returncode == 64
    assert done.stderr.startswith("error: run runs/mine exists: continue it with sslx resume runs/mine")
    assert "building" not in done.stdout


def test_a_short_run_on_ones_own_images_is_told_so(tmp_path: Path):
    rng = np.random.default_rng()
    (tmp_path / "photos").mkdir()
    for i in range(9):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    flags = ["--source.root", "photos", "--data.threads", "0", *TINY[4:]]
    done = sslx("pretrain", *flags, "--steps", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a short run of 1 step: features usually take 500 or more to become good (--steps 500)" in done.stdout


def test_completion_by_bash_and_a_script_for_zsh(tmp_path: Path):
    script = sslx("pretrain", "--tyro-print-completion", "bash", cwd=tmp_path).stdout
    (tmp_path / "sslx.bash").write_text(script)
    for word, last, expected in (("--optim.l", "--optim.l", "--optim.lr"), ("si", "--method.name si", "simclr")):
        line = f"sslx pretrain {last}"
        ask = (
            f"source sslx.bash; COMP_WORDS=({line}); COMP_CWORD={len(line.split()) - 1}; COMP_LINE='{line}'; "
            'COMP_POINT=${#COMP_LINE}; _tyro_sslx_pretrain; printf "%s\\n" "${COMPREPLY[@]}"; complete -p sslx'
        )
        done = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=False)
        *words, registered = done.stdout.split("\n")[:-1]
        assert expected in words, done.stderr
        assert all(found.startswith(word) for found in words)
        assert registered == "complete -F _tyro_sslx_pretrain sslx"
    assert sslx("pretrain", "--tyro-print-completion", "zsh", cwd=tmp_path).stdout.startswith("#compdef sslx")
