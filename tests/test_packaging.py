"""What ``pip install`` brings: a wheel with sslx, sslx_kernels and the recipes, that imports from anywhere."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


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
    licences = [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    assert len(licences) == 1


def test_it_imports_and_runs_from_a_folder_of_its_own(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "import sslx, sslx_kernels.nt_xent, sslx.losses\n"
        "from sslx import config\n"
        "print(sslx.__file__, sslx_kernels.nt_xent.__file__, *config.recipes(), config.load(['simclr_digits']).name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    package, kernels, *names, name = done.stdout.split()
    assert Path(package).is_relative_to(tmp_path)
    assert Path(kernels).is_relative_to(tmp_path)
    assert names == sorted(path.stem for path in (ROOT / "sslx" / "recipes").glob("*.toml"))
    assert name == "simclr_digits"


def test_profiles_have_names_where_there_is_no_checkout(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").touch(0o755)  # submitit looks for it, a dry run does not call it
    names = sorted(path.stem for path in (ROOT / "sslx" / "cluster" / "profiles").glob("*.toml"))
    assert len(names) > 1
    for name in names:
        command = [sys.executable, "-m", "sslx", "submit", "--profile", name, "--dry-run", "--", "simclr_digits"]
        environ = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "#SBATCH" in done.stdout


def test_the_command_and_the_version_are_the_packages(wheel: Path):
    with zipfile.ZipFile(wheel) as file:
        (entry,) = [name for name in file.namelist() if name.endswith("entry_points.txt")]
        assert file.read(entry).decode().split("\n")[:2] == ["[console_scripts]", "sslx = sslx.__main__:main"]
    init = (ROOT / "sslx" / "__init__.py").read_text()
    assert f'__version__ = "{PROJECT["version"]}"' in init
