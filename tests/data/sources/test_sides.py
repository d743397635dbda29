"""The side of the views follows the images' own."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kit.sources import folder
from sslx.data import sources
from sslx.data.sources import sides


def save(folder: Path, sizes: list[tuple[int, int]]) -> list[str]:
    paths: list[str] = []
    for number, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        paths.append(str(folder / f"{number}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return paths


@pytest.mark.parametrize(
    ("sizes", "side"),
    [
        ([(32, 32)] * 5, 32),
        ([(300, 260)] * 5, 224),
        ([(224, 500)] * 5, 224),
        ([(223, 500)] * 5, 192),
        ([(28, 28)] * 5, 24),
        ([(5, 9)] * 5, 8),
        ([(400, 300)] * 9 + [(40, 40)], 224),
        ([(400, 300)] * 6 + [(100, 90)] * 4, 64),
    ],
)
def test_four_of_five_images_have_as_many_pixels(sizes: list[tuple[int, int]], side: int, tmp_path: Path):
    assert sides.suitable(save(tmp_path, sizes)) == (side, "")


def test_what_cannot_be_read_counts_for_nothing(tmp_path: Path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    assert sides.suitable([str(broken), *save(tmp_path, [(64, 64)] * 3)]) == (64, "")
    assert sides.suitable([str(broken)]) == (224, "")
    assert sides.suitable([]) == (224, "")


@pytest.mark.parametrize("suffix", [".tif", ".png", ".webp"])
def test_a_file_of_several_pages_is_noticed(suffix: str, tmp_path: Path):
    generator = np.random.default_rng()
    pages = [Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(3)]
    paths = save(tmp_path, [(64, 64)] * 2)
    for path in (one := tmp_path / f"one{suffix}", several := tmp_path / f"several{suffix}"):
        pages[0].save(path, save_all=path == several, append_images=pages[1:] if path == several else [])
    assert sides.suitable([*paths, str(one)])[1] == ""
    assert sides.suitable([*paths, str(several)])[1] == str(several)
    source = sources.build(folder(tmp_path), "pretrain")
    words = f"several{suffix} holds several pages or frames: only the first of each such file is read"
    assert words in "\n".join(source.notes)
