"""DALI on a GPU: its views are torchvision's on the CPU, a damaged file is replaced, nothing waits or leaks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali")

from kit.sources import by_path, paths_of
from sslx.data import Config, training
from sslx.data.backends.dali import Dali
from sslx.data.backends.torchvision import TorchVision
from sslx.data.order import Sequential
from sslx.data.planner import Planner
from sslx.data.sources import Source
from sslx.data.views import Augment, ViewSpec
from sslx.distributed import Ranks

pytestmark = [pytest.mark.gpu]
NUMBER, CPU = 24, torch.device("cpu")


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Smooth photos as JPEG files, of several sizes, some of them gray."""
    rng = np.random.default_rng()
    for i in range(NUMBER):
        coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((80 + 9 * i, 120 - 2 * i), Image.Resampling.BICUBIC)
        (picture.convert("L") if i % 7 == 3 else picture).save(tmp_path / f"{i:02}.jpg", quality=92)
    return by_path(sorted(tmp_path.glob("*")), np.arange(NUMBER), size=64)


@pytest.mark.parametrize("augment", [None, Augment(hue=0.0, jitter=0.8, gray=0.2, blur=0.5)])
def test_views_are_those_of_torchvision(source: Source, augment: Augment | None) -> None:
    """Within two levels of 255 on average: another decoder, another filter at the border."""
    spec = ViewSpec(size=64, augment=augment, mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255))
    order = Sequential(num_samples=NUMBER, per_rank=NUMBER)
    place = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
    dali = Dali(source, [spec], max_per_rank=NUMBER, device=place, num_threads=2)
    other = TorchVision(source, [spec], device=CPU, num_threads=0)
    planner = Planner(order=order, specs=[spec], seed=5)
    (ours,), (theirs,) = (next(backend.stream(planner, 0)).views for backend in (dali, other))
    assert ours.device.type == place.type
    difference = (ours.float().cpu() - theirs.float()).abs()
    assert difference.mean() < 2
    assert difference.flatten(1).mean(1).max() < 5


@pytest.mark.parametrize("damage", ["half", "empty", "text", "gone"])
def test_a_damaged_file_is_replaced_and_counted(source: Source, damage: str) -> None:
    """The same one by every backend, also where nvJPEG reads what libjpeg-turbo refuses."""
    path = Path(paths_of(source)[5])
    content = path.read_bytes()
    path.write_bytes({"half": content[: len(content) // 2], "empty": b"", "text": b"<html>" * 40, "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
    place = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
    found: list[list[int]] = []
    for backend, device in (("dali", place), ("torchvision", CPU)):
        settings = Config(backend=backend, threads=2 if backend == "dali" else 0, max_bad=0.5)
        spec = ViewSpec(size=32, augment=Augment())
        loader = training(
            settings, source, [spec], batch_size=12, seed=3, ranks=Ranks(device=device), dtype=torch.float32
        )
        labels = [next(loader).label for _ in range(2)]
        assert list(loader.bad) == [5]
        loader.close()
        found.append([int(label) for each in labels if each is not None for label in each])
    assert found[0] == found[1]
    assert 5 not in found[0]
