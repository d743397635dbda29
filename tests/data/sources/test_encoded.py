"""Image files whose bytes a reader brings: on every backend the same batches as the same files by their paths."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from kit.loaders import Backend, assert_same, every_backend, take, training_loader
from kit.sources import in_memory
from sslx.data import Loader
from sslx.data.facts import Channels, Facts
from sslx.data.sources import Encoded, Files, Pixels, Source
from sslx.data.views import Augment, ViewSpec
from sslx.errors import DataError

SPECS = (ViewSpec(size=24, augment=Augment()), ViewSpec(size=16, augment=Augment(max_scale=0.4)))


class Held:
    """A reader of bytes in memory, which cannot read one that is None."""

    def __init__(self, contents: Sequence[bytes | None]) -> None:
        self.contents = contents

    def read(self, rows: npt.NDArray[np.int64]) -> list[bytes]:
        found = [self.contents[row] for row in rows]
        if None in found:
            raise KeyError("it is gone")
        return [content for content in found if content is not None]

    def where(self, row: int) -> str:
        return f"held {row}"


@pytest.fixture
def files(files: Files) -> Files:
    """26 files, one of them a 16-bit TIFF, which DALI does not read itself."""
    values = np.random.default_rng().integers(0, 65536, (40, 50), dtype=np.uint16)
    values[0, :2] = 0, 65535
    Image.fromarray(values).save(files.paths[7], "TIFF")
    return files


def held(files: Files) -> Encoded:
    contents = [Path(path).read_bytes() for path in files.paths]
    return Encoded(name="held", facts=files.facts, reader=Held(contents))


def train(source: Source, backend: str, **settings: Any) -> Loader:
    workers = {"threads": 2} if backend == "torchvision" else {}
    return training_loader(source, backend, SPECS, **workers, **settings)


@every_backend
def test_batches_are_those_of_the_same_files_by_path(files: Files, backend: Backend) -> None:
    some = np.random.default_rng().permutation(26)[:12]
    for one, other in ((held(files), files), (held(files).take(some), files.take(some))):
        assert_same(take(train(one, backend), 5), take(train(other, backend), 5))


@every_backend
def test_what_cannot_be_read_is_replaced_by_the_same_images(files: Files, backend: Backend) -> None:
    contents: list[bytes | None] = [Path(path).read_bytes() for path in files.paths]
    contents[3], contents[11], contents[20] = None, b"no image", (contents[20] or b"")[:200]
    Path(files.paths[3]).unlink()
    Path(files.paths[11]).write_bytes(b"no image")
    Path(files.paths[20]).write_bytes(contents[20] or b"")
    source = Encoded(name="held", facts=files.facts, reader=Held(contents))
    loader = train(source, backend, max_bad=0.5)
    assert_same(take(loader, 9), take(train(files, backend, max_bad=0.5), 9))
    assert loader.bad == {3: "held 3", 11: "held 11", 20: "held 20"}


@every_backend
def test_too_many_end_the_run_with_a_name_and_the_readers_reason(files: Files, backend: Backend) -> None:
    source = Encoded(name="held", facts=files.facts, reader=Held([None] * 26))
    with pytest.raises(DataError, match=r"held \d+ \(KeyError: 'it is gone'\)|none of the 26 images"):
        next(train(source, backend, max_bad=0.2))


def test_a_checkpoint_knows_the_contents(files: Files) -> None:
    source = held(files)
    state = train(source, "synthetic").state_dict()
    train(held(files), "synthetic").load_state_dict(state)
    stream = io.BytesIO()
    Image.new("RGB", (30, 30)).save(stream, "PNG")
    Path(files.paths[0]).write_bytes(stream.getvalue())
    with pytest.raises(DataError, match=r"1 of 26 compared files have other contents, the first one held 0"):
        train(held(files), "synthetic").load_state_dict(state)
    with pytest.raises(DataError, match=r"26 images, the source now has 12"):
        train(source.take(np.arange(12)), "synthetic").load_state_dict(state)


def test_blocks_are_read_together() -> None:
    """Six samples of a batch lie in as many blocks as the order's window of 16 has, and not in any of 200."""
    blocks = np.arange(0, 1000, 5)
    facts = Facts(num_samples=1000, size=8, blocks=blocks)
    loader = train(Encoded(name="held", facts=facts, reader=Held([b""] * 1000)), "synthetic")
    for _ in range(20):
        touched = np.unique(next(loader).index.numpy() // 5)
        assert len(touched) <= 6
    first = [next(loader).index.numpy() for _ in range(12)]
    assert len(np.unique(np.concatenate(first) // 5)) <= 3 * 16, "windows of 16 blocks, one after another"


def test_facts_that_do_not_fit_the_pixels_are_refused() -> None:
    pixels = np.zeros((8, 9, 9, 4), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"8 images of 3 channels .* its pixels are 8 arrays of shape \(9, 9, 4\)"):
        in_memory(pixels)
    four = Channels(num=4, is_rgb=False)
    with pytest.raises(ValueError, match="9 images of 4 channels of type uint8, but its pixels are 8"):
        Pixels(name="x", facts=Facts(num_samples=9, size=8, channels=four), pixels=pixels)
    with pytest.raises(ValueError, match=r"of type uint8, but its pixels are 8 arrays .* of type uint16"):
        Pixels(name="x", facts=Facts(num_samples=8, size=8, channels=four), pixels=pixels.astype(np.uint16))
