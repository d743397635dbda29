"""``sslx resume``, ``sweep``, ``methods``, ``recipes`` and the help: real commands, as a user types them."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kit.python import python
from sslx import cli, config, methods
from sslx.config import flags
from sslx.errors import ConfigError

TINY = (
    "--source.name synthetic --source.num-samples 32 --data.size 16 --data.backend torchvision --data.threads 0 "
    "--batch-size 8 --encoder.layers 1 1 1 1 --encoder.channels 8 8 8 8 --method.hidden-dim 16 --steps 2 "
    "--precision fp32 --online.every 0 --compile off"
).split()
LIGHT = """
import sys
from sslx import cli
for command in sys.argv[1:]:
    cli.main(command.split())
    heavy = {"torch", "numpy", "timm", "nvidia.dali", "wandb", "PIL"} & set(sys.modules)
    if heavy:
        sys.exit(f"sslx {command} imported {heavy}")
"""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_help_lists_and_wrong_flags_need_neither_torch_nor_numpy(tmp_path: Path):
    of_pretrain = ["--help", "simclr_digits --help-all", "--optim.lrr 1", "simclr_digit"]
    helps = [
        f"{command} --help"
        for command in ("probe", "compare", "plot", "embed", "neighbors", "look", "verify", "resume", "sweep")
    ]
    commands = [*(f"pretrain {flags}" for flags in of_pretrain), *helps, "methods", "recipes", "jobs"]
    python("-c", LIGHT, *commands, cwd=tmp_path)


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
    names = [line.split()[0] for line in lines[1:] if line[:1].strip()]
    assert names[: len(methods.available())] == list(methods.available())
    assert cli.main(["pretrain", "--help-all"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(f"{name}," in text or f"{name}}}" in text for name in methods.available())


def test_all_recipes_have_a_line(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["recipes"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in flags.recipes())
    assert "kNN 38.1 %, linear 44.1 %" in text


def test_a_run_goes_on_by_any_natural_command(tmp_path: Path):
    assert cli.main(["pretrain", *TINY, "--name", "a"]) == 0
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
    assert cli.main(["resume", str(moved)]) == 0
    assert not (tmp_path / "runs" / "a").exists()


def test_what_is_no_run_is_said_so(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--resume takes auto, no or the folder of a run, and .* holds no run"):
        config.load(["--resume", str(tmp_path)])


def saved(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / name).read_text())


@pytest.mark.slow
def test_a_sweep_trains_all_runs_and_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "lrs.toml").write_text('[grid]\n"optim.lr" = [0.1, 0.2]\n')
    assert cli.main(["pretrain", *TINY, "--name", "s-lr=0.1", "--optim.lr", "0.1"]) == 0  # as if it was stopped there
    for num_done in (1, 2):
        assert cli.main(["sweep", "lrs.toml", *TINY, "--name", "s"]) == 0
        out = capfd.readouterr().out
        assert (out.count("done: 2 steps"), out.count(" is done")) == (2 if num_done == 1 else 0, num_done)
    for lr in ("0.1", "0.2"):
        run = tmp_path / "runs" / f"s-lr={lr}"
        assert (saved(run, "config.json")["optim"]["lr"], saved(run, "status.json")["state"]) == (float(lr), "done")


@pytest.mark.slow
def test_a_sweep_says_which_run_failed_and_trains_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "mixed.toml").write_text('[[run]]\n"method.queue" = 1\n')
    assert cli.main(["sweep", "mixed.toml", *TINY]) == 64  # before anything is trained
    (tmp_path / "sizes.toml").write_text('[grid]\n"batch_size" = [64, 8, 4]\n')  # 64 of 32 images
    assert cli.main(["sweep", "sizes.toml", *TINY, "--name", "s"]) == 64
    out = capfd.readouterr().out
    for name in ("s-batch_size=8", "s-batch_size=4"):
        assert name in out
        assert saved(tmp_path / "runs" / name, "status.json")["state"] == "done"


def test_a_name_in_place_of_a_runs_folder_and_an_existing_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Both are answered at once, before the encoder is built."""
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.json").write_text("{}")
    (tmp_path / "photos").mkdir()
    for command in ("probe", "plot", "resume"):
        assert cli.main([command, "mine"]) in (64, 66)
        assert "did you mean runs/mine?" in capsys.readouterr().err
    cli.main(["probe", "photos"])
    err = capsys.readouterr().err
    assert "no checkpoint at photos" in err
    assert "--source.root" in err
    assert cli.main(["pretrain", *TINY, "--name", "mine"]) == 64
    out, err = capsys.readouterr()
    assert err.startswith("error: run runs/mine exists: continue it with sslx resume runs/mine")
    assert "building" not in out


def test_a_short_run_on_ones_own_images_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rng = np.random.default_rng()
    (tmp_path / "photos").mkdir()
    for i in range(9):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    assert cli.main(["pretrain", "--source.root", "photos", *TINY[4:], "--steps", "1"]) == 0
    expected = "a short run of 1 step: features usually take 500 or more to become good (--steps 500)"
    assert expected in capsys.readouterr().out


def test_completion_by_bash_and_a_script_for_zsh(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cli.main(["pretrain", "--tyro-print-completion", "bash"])
    (tmp_path / "sslx.bash").write_text(capsys.readouterr().out)
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
    cli.main(["pretrain", "--tyro-print-completion", "zsh"])
    assert capsys.readouterr().out.startswith("#compdef sslx")
