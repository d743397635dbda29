"""The ``sslx`` command: what it lists, how fast, how it reads, and how an error looks."""

import dataclasses
import os
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docstring_parser
import pytest

from sslx import __version__, cli, config


def test_usage_version_and_unknown_commands(capsys: pytest.CaptureFixture[str]):
    for argv in ([], ["-h"], ["--help"], ["help"]):
        assert cli.main(argv) == 0
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 80
        assert all(f"  {name} " in out for name in cli.COMMANDS)
    for argv in (["-V"], ["--version"]):
        assert (cli.main(argv), capsys.readouterr().out) == (0, f"sslx {__version__}\n")
    assert cli.main(["pretrian"]) == 64
    assert capsys.readouterr() == (
        "",
        f"error: sslx has no command 'pretrian': did you mean pretrain? Use one of {', '.join(cli.COMMANDS)}\n",
    )
    assert cli.main(["--nonsense"]) == 64


def test_usage_and_version_import_nothing_heavy():
    calls = "main(['--help']); main(['--version']); main(['pretrian'])"
    code = f"import sys; from sslx.cli import main; {calls}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = {name.partition(".")[0] for name in done.stdout.split()}
    assert not modules & {"torch", "numpy", "tyro", "rich", "timm", "matplotlib", "sklearn", "nvidia", "wandb"}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_fits_80_columns(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(len(line) for line in out.splitlines() if not line.startswith("usage: ")) <= 80
    assert "sslx" in out
    assert len(out.splitlines()) == 1 or f"usage: sslx {command}" in out


def options(kind: type) -> Iterator[tuple[type, str]]:
    hints: dict[str, Any] = typing.get_type_hints(kind)
    for entry in dataclasses.fields(kind):
        inner = hints[entry.name]
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            yield from options(inner)
        else:
            yield kind, entry.name


@pytest.mark.parametrize(
    "kind",
    [*(config.PretrainConfig, config.ProbeConfig, config.PlotConfig, config.EmbedConfig, config.NeighborsConfig)],
)
def test_every_option_has_a_help_text_of_one_line(kind: type):
    """One line in the source: tyro keeps an indented line break, and so tears the text in the middle."""
    for owner, name in options(kind):
        found = [docstring_parser.parse_from_object(base) for base in owner.__mro__[:-1]]
        texts = [p.description for doc in found for p in doc.params if p.arg_name == name and p.description]
        assert texts, f"{owner.__module__}.{name} has no help text"
        assert "\n" not in texts[0], f"{owner.__module__}.{name}: {texts[0]}"


def test_exit_codes_of_what_a_command_raises(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert cli.main(["pretrain", "no_such_recipe"]) == 66
    assert cli.main(["pretrain", "--epohcs", "3"]) == 64
    assert cli.main(["pretrain", "--epochs", "0"]) == 64
    assert capsys.readouterr().err.endswith("error: --epochs must be at least 1, not 0\n")
    for command in ("probe", "plot"):
        assert cli.main([command]) == 64
        assert "PATH" in capsys.readouterr().err
        assert cli.main([command, str(tmp_path)]) == 66
        assert capsys.readouterr().err == (
            f"error: no checkpoint at {tmp_path}: pass a run folder or a step_N directory in it; use "
            "--source.root for the images\n"
        )


def test_help_needs_no_model_library_and_a_reader_that_has_seen_enough_is_no_error():
    """timm, with torchvision and wandb behind it, takes three seconds to import.  sslx pretrain --help | head -3"""
    code = (
        "import os, sys\nfrom sslx.cli import main\n"
        "main(['pretrain', '--help'])\nprint(*sys.modules, flush=True)\n"
        "read, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\n"
        "sys.exit(main(['pretrain', '--help']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    modules = set(done.stdout.splitlines()[-1].split())
    assert "tyro" in modules
    assert not modules & {"timm", "torchvision", "matplotlib", "sklearn", "wandb", "nvidia.dali"}
    assert (done.returncode, done.stderr) == (141, "")


def test_a_closed_pipe_is_no_error_at_exit_either():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        command = [sys.executable, "-m", "sslx", "--help"]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")


COMPLAIN = "from sslx.cli import complain; raise SystemExit(complain({message!r}, {code}))"


def test_many_ranks_complain_once(tmp_path: Path):
    """Three ranks of one parent say one line; another message, another parent or a lone process each say theirs."""
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        "import os, subprocess, sys\n"
        "def rank(r, code): return subprocess.Popen([sys.executable, '-c', code], env=os.environ | {'RANK': str(r)})\n"
        f"ranks = [rank(r, {COMPLAIN.format(message='no images', code=66)!r}) for r in range(3)]\n"
        "codes = [r.wait() for r in ranks]\n"
        f"codes.append(rank(1, {COMPLAIN.format(message='no memory', code=64)!r}).wait())\n"
        "print(codes)\n"
    )
    environ = os.environ | {"TMPDIR": str(tmp_path)}
    for _ in range(2):
        done = subprocess.run([sys.executable, launcher], capture_output=True, text=True, check=True, env=environ)
        assert done.stdout == "[66, 66, 66, 64]\n"
        assert done.stderr == "error: no images\nerror: no memory\n"
        parents = {path.name.split("-")[2] for path in tmp_path.glob("sslx-said-*")}
        assert len(parents) == 1, "the files of a parent that has ended are removed by the next one's ranks"


def test_another_start_of_the_same_parent_complains_again(tmp_path: Path):
    """By a rank that had not said it before: one of another port, or of torchrun's next attempt."""
    environ = os.environ | {"TMPDIR": str(tmp_path), "MASTER_PORT": "1234"}
    for rank, start in (("0", {}), ("1", {"MASTER_PORT": "1235"}), ("2", {"TORCHELASTIC_RESTART_COUNT": "1"})):
        command = [sys.executable, "-c", COMPLAIN.format(message="no images", code=66)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environ | {"RANK": rank} | start
        )
        assert done.stderr == "error: no images\n"


def test_one_process_may_complain_again(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    assert [cli.complain("again", 65), cli.complain("again", 65)] == [65, 65]
    assert capsys.readouterr().err == "error: again\n" * 2


def test_an_interrupt_is_130_without_a_traceback(tmp_path: Path):
    code = (
        "import os, signal, sys\nfrom sslx import cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell starts its background jobs without
        "sys.modules['slow'] = type(sys)('slow')\n"
        "sys.modules['slow'].main = lambda argv: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(cli.run('slow:main', []))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")
