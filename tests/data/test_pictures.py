"""Images in whatever form a program has them, read by threads."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from kit.sources import by_path, in_memory
from sslx.data import pictures
from sslx.data.pictures import Transform, batches, pictures_of
from sslx.data.views import ViewSpec
from sslx.errors import DataError

VIEW = ViewSpec(size=16, center=0.875)
CPU = torch.device("cpu")
Array = npt.NDArray[np.uint8]


def noise(height: int, width: int) -> Array:
    return np.random.default_rng().integers(0, 256, (height, width, 3), dtype=np.uint8)


def views(images: Any, batch_size: int = 4, num_threads: int = 2) -> list[Tensor]:
    made = batches(pictures_of(images), VIEW, batch_size, num_threads)
    return [pictures.normalized(batch, VIEW, CPU) for batch in made]


def alone(images: list[Any]) -> Tensor:
    """Each by the transform."""
    return torch.stack([Transform(VIEW)(image) for image in images])


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """PNG files of several sizes, some of which follow on others of the same size."""
    sizes = [(20, 31), (20, 31), (20, 31), (9, 12), (64, 40), (64, 40), (16, 16), (14, 200), (14, 200)]
    names = [tmp_path / f"{i}.png" for i in range(len(sizes))]
    for name, size in zip(names, sizes, strict=True):
        Image.fromarray(noise(*size)).save(name)
    return names


def test_every_form_of_the_same_pictures_gives_the_same_views_to_the_last_bit(paths: list[Path]) -> None:
    expected = alone(list(paths))
    arrays = [np.array(Image.open(path)) for path in paths]
    tensors = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
    with_labels = [(path, 3) for path in paths]
    for images in (
        *(paths, paths[0].parent, str(paths[0].parent), (str(path) for path in paths), with_labels, by_path(paths)),
        *(map(Image.open, paths), arrays, tensors, [tensor / 255 for tensor in tensors]),
        [{"image": array, "label": 0} for array in arrays],
    ):
        made = views(images)
        assert [len(batch) for batch in made] == [4, 4, 1]
        assert torch.equal(torch.cat(made), expected)
        assert made[0].is_contiguous(memory_format=torch.channels_last)
    for many in (np.stack(arrays[:3]), torch.stack(tensors[:3]), in_memory(np.stack(arrays[:3]))):
        assert torch.equal(torch.cat(views(many)), expected[:3])
    for one in (paths[0], arrays[0], tensors[0], Image.open(paths[0])):
        assert torch.equal(torch.cat(views(one)), expected[:1])


def test_a_turned_photo_and_one_with_transparency_are_the_same_as_a_file_and_as_a_pil_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(noise(20, 30)).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(noise(20, 30)).convert("P").save(tmp_path / "transparent.png", transparency=3)
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            before = dict(image.info)
            assert torch.equal(alone([image]), alone([path]))
            assert image.info == before
    with pytest.raises(ValueError, match="expected a PIL image of RGB or gray pixels of 8 bits, got a"):
        alone([Image.fromarray(np.zeros((4, 4), np.float32))])


class Slow(Dataset[Any]):
    """Notes by which threads it is asked, and how far."""

    def __init__(self, length: int) -> None:
        self.length, self.asked, self.threads = length, 0, set[int]()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Array:
        assert index == self.asked < self.length
        self.asked += 1
        self.threads.add(threading.get_ident())
        return noise(20, 20)


def test_a_dataset_is_asked_in_order_by_one_thread_and_not_far_ahead() -> None:
    dataset = Slow(100)
    made = batches(pictures_of(dataset), VIEW, 5, 3)
    next(made)
    time.sleep(0.2)
    assert dataset.asked == 20, "the batch that came and three ahead of it"
    assert sum(map(len, made)) == 95
    assert len(dataset.threads) == 1
    assert threading.get_ident() not in dataset.threads


def test_files_are_decoded_by_several_threads_which_end_with_the_use_of_their_views(paths: list[Path]) -> None:
    threads, both = set[int](), threading.Barrier(2, timeout=30)

    class Waiting(os.PathLike[str]):
        def __fspath__(self) -> str:
            if threading.get_ident() not in threads:
                threads.add(threading.get_ident())
                both.wait()  # until another thread decodes too
            return str(paths[0])

    before = threading.active_count()
    made = batches(pictures_of([Waiting()] * 180), VIEW, 8, 2)
    next(made)
    assert len(threads) == 2
    made.close()
    assert threading.active_count() == before


def failing() -> Iterator[Array]:
    yield noise(8, 8)
    raise RuntimeError("the database is gone")


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (3, "got an object of type int"),
        ({"picture": 3}, "got an object of type NoneType"),
        (noise(4, 4)[..., :2], r"got \(4, 4, 2\) of uint8"),
        (torch.zeros(1, 4, 4), r"expected a \(3, H, W\) tensor of uint8 or floats, got \(1, 4, 4\)"),
        (2 * torch.rand(3, 40, 40) - 1, "floats from 0 to 1, got -.* normalized already go into .encoder"),
        (torch.full((3, 4, 4), torch.nan), "floats from 0 to 1, got nan"),
    ],
)
def test_what_is_no_picture_is_told_in_one_line(image: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^[^\n]*{words}[^\n]*$"):
        views([noise(4, 4), image])


def test_a_file_that_cannot_be_read_is_named_and_an_error_of_the_program_is_its_own(paths: list[Path]) -> None:
    paths[6].write_bytes(paths[6].read_bytes()[:40])
    for images in (paths, by_path(paths), paths[0].parent):
        with pytest.raises(DataError, match=r"^[^\n]*6\.png cannot be read: [^\n]*$"):
            views(images)
    with pytest.raises(RuntimeError, match="the database is gone"):
        views(failing())
