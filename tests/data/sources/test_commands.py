"""The table of forms of images in sslx/data/README.md: each command trains on files that this test makes."""

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import chdir, nullcontext
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kit import containers
from kit.http_server import serving
from kit.sources import noise
from sslx import cli

README = Path(__file__).parents[3] / "sslx" / "data" / "README.md"
COMMANDS = re.findall(r"^\| .* \| `(sslx pretrain .*)` \|$", README.read_text(), re.MULTILINE)
TINY = (
    "--runs runs --name run --steps 2 --batch-size 8 --num-micro-batches 1 --data.size 8 --data.backend torchvision "
    "--data.threads 0 --encoder.layers 1 1 1 1 --encoder.channels 8 8 8 8 --method.hidden-dim 8 "
    "--method.projection-dim 8 --online.every 0 --health.every 0 --device cpu"
)
OWN = '''
"""Images of one's own."""
from sslx.data.sources import SourceConfig, folder

class MyImages(SourceConfig):
    """Photos of mine."""

    def build(self, split, context):
        from pathlib import Path
        return folder.Config(root=Path("photos")).build(split, context)
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with twelve images in each form that the table names."""
    root = tmp_path_factory.mktemp("forms")
    for name in ("cat", "dog"):
        noise(root / "photos" / name, 6)
    paths = sorted((root / "photos").rglob("*.png"))
    contents, labels = [path.read_bytes() for path in paths], [path.parent.name for path in paths]
    relative = [path.relative_to(root) for path in paths]
    rows = [f"{path},{label}" for path, label in zip(relative, labels, strict=True)]
    (root / "photos.csv").write_text("\n".join(["path,label", *rows]))
    (root / "photos.txt").write_text("\n".join(map(str, relative)))
    lines = [f'{{"path": "{path.relative_to("photos")}"}}' for path in relative]
    (root / "photos.jsonl").write_text("\n".join(lines))
    for shard in range(3):
        members = [(f"{i}.png", contents[i]) for i in range(4 * shard, 4 * shard + 4)]
        containers.tar(root / "shards" / f"train-{shard:03}.tar", members)
    columns = {"image": contents, "label": labels}
    containers.parquet(root / "tables" / "train-0.parquet", columns)
    containers.arrow(root / "saved" / "train" / "data-00000-of-00001.arrow", columns)
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    np.save(root / "images.npy", pixels)
    np.save(root / "labels.npy", np.array(labels))
    random = np.random.default_rng()
    np.save(root / "bands.npy", random.integers(0, 60_000, (12, 5, 16, 20), dtype=np.uint16))
    (root / "scans").mkdir()
    for number in range(12):
        scan = random.integers(0, 4096, (16, 20), dtype=np.uint16)
        Image.fromarray(scan).save(root / "scans" / f"{number}.png")
    np.savez(root / "images.npz", images=pixels, labels=np.array(labels))
    if find_spec("h5py"):
        import h5py  # pyright: ignore[reportMissingImports]

        with h5py.File(root / "images.h5", "w") as file:
            file["images"] = pixels
    (root / "my_images.py").write_text(OWN)
    with chdir(root):
        yield root


def test_the_table_is_there() -> None:
    assert len(COMMANDS) == 15


def test_the_sources_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sources"]) == 0
    table = capfd.readouterr().out
    for name in ("list", "tar", "parquet", "arrays"):
        assert re.search(rf"^{name} .*--source.root", table, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[-1])
def test_every_command_of_the_table_trains(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if "h5" in command and not find_spec("h5py"):
        pytest.skip("h5py is not installed")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    shutil.rmtree(place / "runs", ignore_errors=True)
    with serving(place) if "localhost" in command else nullcontext(None) as server:
        argv = shlex.split(command.replace("http://localhost:8000", server.address if server else ""))
        assert cli.main([*argv[1:], *TINY.split()]) == 0, capfd.readouterr().err
    assert (place / "runs" / "run" / "checkpoints" / "step_2" / "manifest.json").is_file()
    assert "12 images" in "".join(capfd.readouterr())


def test_a_class_that_is_not_there_is_refused(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert place.is_dir()
    for name, code, words in (
        ("my_images:Others", 64, "my_images:Others cannot be used: Others does not exist"),
        ("my_images:folder", 64, "folder is no dataclass of options"),
        ("no_such_module:X", 66, "no module no_such_module is installed"),
    ):
        assert cli.main(["pretrain", "--source.name", name, *TINY.split()]) == code
        assert words in capfd.readouterr().err
