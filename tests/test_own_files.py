"""Methods and sources in a user's own files, as the READMEs have them: trained by, from the command line."""

import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kit.checkpoints import equal
from kit.sources import folder
from sslx import cli
from sslx.by_name import Family
from sslx.config import load
from sslx.data import Config, sources, training
from sslx.data.views import Augment, ViewSpec
from sslx.distributed import Ranks
from sslx.errors import ConfigError, MissingInput
from sslx.methods.config import MethodConfig

ROOT = Path(__file__).parents[1]
TINY = (
    "--data.size 16 --encoder.layers 1 1 1 1 --encoder.channels 8 8 8 8 --batch-size 8 --steps 2 --optim.name sgd "
    "--online.every 0 --health.every 0 --device cpu --precision fp32 --log.every 1"
).split()


def code_of(readme: Path, first_words: str) -> str:
    """The Python file in a README that begins with these words."""
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    (code,) = [block for block in blocks if block.startswith(f'"""{first_words}')]
    return code


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the files; a process imports one file of a name only."""
    return tmp_path_factory.mktemp("own")


@pytest.fixture(scope="module")
def zip_images(place: Path) -> Path:
    code = code_of(ROOT / "sslx" / "data" / "README.md", "Images in a zip file")
    assert code.count("\n") < 60
    (place / "zip_images.py").write_text(code)
    return place / "zip_images.py"


@pytest.fixture(scope="module")
def photos(place: Path) -> Path:
    """24 pictures in three folders, and an archive of them."""
    rng = np.random.default_rng()
    with zipfile.ZipFile(place / "photos.zip", "w") as archive:
        for i in range(24):
            path = place / "photos" / ("cat", "dog", "owl")[i % 3] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((30, 24 + i)).save(path)
            archive.write(path, path.relative_to(place / "photos"))
    return place / "photos"


@pytest.mark.usefixtures("photos")
def test_a_run_of_a_method_and_a_source_of_ones_own(
    zip_images: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    Path("alignment.py").write_text(code_of(ROOT / "sslx" / "methods" / "README.md", "Alignment and uniformity"))
    flags = ["--method.name", "alignment.py", "--method.projection-dim", "8", "--data.threads", "1", *TINY]
    flags += ["--source.name", f"./{zip_images.name}", "--source.archive", "photos.zip"]
    assert cli.main(["pretrain", *flags, "--data.backend", "torchvision"]) == 0
    run, out = place / "runs" / "alignment_zip_images", capfd.readouterr().out
    assert "alignment on resnet50" in out or "alignment on resnet18" in out
    assert "photos.zip: 24 images, 3 classes (cat, dog, owl)" in out
    saved = json.loads((run / "config.json").read_text())
    assert saved["source"] == {"name": str(zip_images), "archive": "photos.zip"}
    assert (saved["method"]["name"], saved["method"]["projection_dim"]) == (str(place / "alignment.py"), 8)
    assert saved["method"]["sharpness"] == 2.0
    assert cli.main(["resume", str(run)]) == 0
    assert cli.main(["probe", str(run), "--no-baselines", "--probe.shots", "1", "--probe.num-draws", "1"]) == 0
    assert cli.main(["pretrain", "--help-all", "--source.name", "zip_images.py"]) == 0
    out = capfd.readouterr().out
    assert "--source.archive" in out
    assert "Zip file of images." in out


@pytest.mark.parametrize("backend", ["dali", "torchvision", "resident"])
def test_batches_from_an_archive_are_those_of_its_files(zip_images: Path, photos: Path, backend: str) -> None:
    argv = ["--source.name", str(zip_images), "--source.archive", f"{photos}.zip"]
    settings = load([*argv, "--data.backend", backend, "--data.threads", "1"])
    archive = sources.build(settings.source, "train", settings.data)
    files = sources.build(folder(photos), "train")
    assert archive.facts.blocks is not None
    assert archive.facts.blocks.tolist() == [0, 8, 16]
    spec, config = ViewSpec(size=16, augment=Augment()), Config(backend=settings.data.backend, threads=1)
    ranks = Ranks(device=torch.device("cpu"))
    whole = sources.Encoded(name="all", facts=archive.facts.take(np.arange(24)), reader=vars(archive)["reader"])
    loaders = [
        training(config, source, [spec], batch_size=8, seed=1, ranks=ranks, dtype=torch.float32)
        for source in (whole, files)
    ]
    for _ in range(4):
        a, b = (next(loader) for loader in loaders)
        assert a.label is not None
        assert equal((a.index, a.views, a.label), (b.index, b.views, b.label))
    for loader in loaders:
        loader.close()


METHODS = Family[MethodConfig]("sslx.methods", "--method.name", shared=(), light=())


def test_what_is_no_such_file_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"--method.name /.*/nowhere.py: there is no such file"):
        METHODS.options("nowhere.py")
    for name, content, words in (
        ("json.py", "x = 1\n", r"json.py cannot be imported as the module json: there is another module of this name"),
        ("my-method.py", "x = 1\n", r"cannot be imported as the module my-method: rename the file"),
        ("broken_method.py", "x = (\n", r"broken_method.py cannot be imported: SyntaxError: "),
        ("empty_method.py", '"""Nothing."""\n', r"empty_method.py has no class Config, which holds its options"),
        ("lacking_method.py", "import no_such_library\n", r"ModuleNotFoundError: No module named 'no_such_library'"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=words) as caught:
            METHODS.options(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_options_are_read_without_what_else_the_file_imports(tmp_path: Path) -> None:
    """So that --help takes no torch; the module itself is imported when it is used."""
    (tmp_path / "heavy_method.py").write_text(
        '"""A method that nobody has published."""\n'
        "import no_such_library\n"
        "from dataclasses import dataclass\n"
        "from sslx.methods.config import MethodConfig\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Config(MethodConfig):\n"
        "    name: str = 'heavy'\n"
        "    width: int = 7\n"
    )
    family = Family[MethodConfig]("sslx.methods", "--method.name", shared=(), light=("sslx.methods.config",))
    path = str(tmp_path / "heavy_method.py")
    assert vars(family.options(path)(name="x"))["width"] == 7
    assert family.summary(path) == "A method that nobody has published."
    with pytest.raises(ConfigError, match="cannot be imported: ModuleNotFoundError"):
        family.module(path)
