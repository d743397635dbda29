"""What ``pip install`` brings: a wheel with sslx, sslx_kernels and the recipes, that imports from anywhere."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tracked(pattern: str) -> list[Path]:
    done = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_has_two_packages_with_all_their_files(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sslx", "sslx_kernels"}
    sources = [path for path in tracked("sslx/*") if path.exists()]
    sources += [path for path in tracked("kernels/sslx_kernels/*") if path.exists()]
    expected = {str(path.relative_to(ROOT)).removeprefix("kernels/") for path in sources}
    assert expected <= names
    assert {"sslx/recipes/simclr_digits.toml", "sslx/py.typed", "sslx_kernels/py.typed"} <= names
    assert not [name for name in names if "__pycache__" in name]
    assert sum(name.endswith(".dist-info/licenses/LICENSE") for name in names) == 1


@pytest.mark.slow
def test_it_imports_and_submits_from_a_folder_of_its_own(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (tmp_path / "sbatch").touch(0o755)  # submitit looks for it, a dry run does not call it
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    recipes, profiles = (
        sorted(path.stem for path in (ROOT / "sslx" / folder).glob("*.toml"))
        for folder in ("recipes", "cluster/profiles")
    )
    assert len(profiles) > 1
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "import sslx, sslx_kernels.nt_xent, sslx.losses\n"
        "from sslx import cli, config\n"
        "print(sslx.__file__, sslx_kernels.nt_xent.__file__, *config.recipes(), config.load(['simclr_digits']).name)\n"
        f"for name in {profiles}:\n"
        "    assert cli.main(['submit', '--profile', name, '--dry-run', '--', 'simclr_digits']) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, *scripts = done.stdout.splitlines()
    package, kernels, *names, name = first.split()
    assert Path(package).is_relative_to(tmp_path)
    assert Path(kernels).is_relative_to(tmp_path)
    assert (names, name) == (recipes, "simclr_digits")
    assert scripts.count("#!/bin/bash") == len(profiles)


def test_the_command_is_the_packages(wheel: Path):
    with zipfile.ZipFile(wheel) as file:
        (entry,) = [name for name in file.namelist() if name.endswith("entry_points.txt")]
        assert file.read(entry).decode().split("\n")[:2] == ["[console_scripts]", "sslx = sslx.__main__:main"]
