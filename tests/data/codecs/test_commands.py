"""The table of formats in sslx/data/codecs/README.md: each command trains on files that this test makes."""

import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import chdir
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kit.image_files import Array, encoded, png, tiff
from kit.rare_files import HAS_AVIF, dicom, heif, npy
from sslx import cli

README = Path(__file__).parents[3] / "sslx" / "data" / "codecs" / "README.md"
COMMANDS = re.findall(r"^\| .* \| `(sslx pretrain .*)` \|$", README.read_text(), re.MULTILINE)
TINY = (
    "--runs runs --name run --steps 1 --batch-size 4 --num-micro-batches 1 --data.size 8 --data.backend torchvision "
    "--data.threads 0 --encoder.layers 1 1 1 1 --encoder.channels 8 8 8 8 --method.hidden-dim 8 "
    "--method.projection-dim 8 --online.every 0 --health.every 0 --device cpu"
)
PER_FORMAT = 4
NEEDS = {"heic": bool(find_spec("pillow_heif")), "avif": HAS_AVIF, "dicom": bool(find_spec("pydicom"))}
"""Whether the formats can be read here that not every installation reads."""


def pages(rgb: Array) -> bytes:
    return encoded(Image.fromarray(rgb), "TIFF", save_all=True, append_images=[Image.fromarray(255 - rgb)])


def of(kind: str) -> Callable[[Array], bytes]:
    return lambda rgb: encoded(Image.fromarray(rgb), kind)


WRITERS: dict[str, dict[str, Callable[[Array], bytes]]] = {
    "jpeg": {"jpg": of("JPEG")},
    "png": {"png": of("PNG")},
    "scans": {"png": lambda rgb: png(rgb.astype(np.uint16) * 16, 16, 2)},
    "web": {"gif": of("GIF"), "bmp": of("BMP"), "webp": of("WEBP")},
    "tiff": {"tif": lambda rgb: tiff(rgb.astype(np.uint16) * 257)},
    "pages": {"tif": pages, "dcm": lambda rgb: dicom(np.stack([rgb[..., 0], rgb[..., 1]]))},
    "jpeg2000": {"jp2": of("JPEG2000")},
    "avif": {"avif": of("AVIF")},
    "heic": {"heic": lambda rgb: heif(Image.fromarray(rgb))},
    "dicom": {
        "dcm": lambda rgb: dicom(rgb[..., 0].astype(np.uint16) * 4, stored=12, rescale=(1, -1024), modality="CT")
    },
    "npy": {"npy": npy},
}
"""How the files of each folder in the table are written, by their endings."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with four images in each format that the table names and this machine can write."""
    root = tmp_path_factory.mktemp("formats")
    generator = np.random.default_rng()
    for name, writers in WRITERS.items():
        if not NEEDS.get(name, True):
            continue
        (root / name).mkdir()
        for suffix, write in writers.items():
            if suffix == "dcm" and not NEEDS["dicom"]:
                continue
            for number in range(PER_FORMAT):
                rgb = generator.integers(0, 256, (16, 20, 3), dtype=np.uint8)
                (root / name / f"{number}.{suffix}").write_bytes(write(rgb))
    (root / "npy.txt").write_text("\n".join(f"npy/{number}.npy" for number in range(PER_FORMAT)))
    with chdir(root):
        yield root


def folder(command: str) -> str:
    return shlex.split(command)[shlex.split(command).index("--source.root") + 1].removesuffix(".txt")


def test_the_table_has_every_format() -> None:
    assert [folder(command) for command in COMMANDS] == list(WRITERS)


@pytest.mark.parametrize("command", COMMANDS, ids=folder)
def test_every_command_of_the_table_of_formats_trains(
    command: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = folder(command)
    if not NEEDS.get(name, True):
        pytest.skip("no library is installed that reads these files")
    shutil.rmtree(place / "runs", ignore_errors=True)
    assert cli.main([*shlex.split(command)[1:], *TINY.split()]) == 0, capfd.readouterr().err
    assert (place / "runs" / "run" / "checkpoints" / "step_1" / "manifest.json").is_file()
    said = "".join(capfd.readouterr())
    assert f"{len(list((place / name).iterdir()))} images" in said
    assert "unreadable" not in said
