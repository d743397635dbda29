"""What lineage claims of an image is what loaders deliver: which batch, which crop, flipped and rotated or not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from kit.errors import raises_one_line
from kit.loaders import AS_STORED, assert_same, every_backend, take, training_loader
from kit.sources import by_path, in_memory
from sslx.data import exclusion
from sslx.data.lineage import Training
from sslx.data.order import Shuffled
from sslx.data.sources import Files
from sslx.data.views import Augment, ViewSpec
from sslx.errors import ConfigError, MissingInput

CROPPED = Augment(jitter=0, gray=0, blur=0, vertical_flip=0.5, right_angles=0.5)
SPECS = tuple(ViewSpec(size=size, augment=CROPPED, **AS_STORED) for size in (20, 12))
STEPS = 84  # of two micro-batches of 3 of 40 samples: 14 epochs, each of which leaves 4 samples out


@pytest.mark.parametrize("blocks", [None, np.array([0, 7, 7, 20, 31])], ids=["shuffled", "in blocks"])
def test_a_thousand_claims_are_what_the_loader_delivered(blocks: npt.NDArray[np.int64] | None) -> None:
    random = np.random.default_rng()
    images = np.empty(40, dtype=object)
    for i in range(40):
        images[i] = random.integers(0, 256, (*random.integers(16, 60, 2), 3), dtype=np.uint8)
    source = in_memory(images)
    source = replace(source, facts=replace(source.facts, blocks=blocks))
    loader = training_loader(source, "torchvision", SPECS, accumulate=2, threads=0)
    batches = take(loader, 2 * STEPS)
    order = Shuffled(num_samples=40, batch_size=6, accumulate=2, seed=3, blocks=blocks)
    training = Training(order=order, num_steps=STEPS, specs=SPECS, seed=3)
    num_claims = 0
    for index in range(40):
        height, width = images[index].shape[:2]
        for claim in training.appearances([index], height, width):
            found = [(batch, batch.index.tolist()) for batch in batches[2 * claim.step - 2 : 2 * claim.step]]
            ((batch, row),) = [(batch, samples.index(index)) for batch, samples in found if index in samples]
            top, left, bottom, right = claim.box
            crop = torch.from_numpy(images[index][top:bottom, left:right]).permute(2, 0, 1)
            side = SPECS[claim.view].size
            expected = F.resize(crop, [side, side], antialias=True).float()
            expected = expected.flip(-1) if claim.draws["flip"] else expected
            expected = expected.flip(-2) if claim.draws["vertical_flip"] else expected
            expected = expected.rot90([0.0, 1.0, 2.0, 3.0].index(claim.draws["quarter_turns"]), (-2, -1))
            assert (batch.views[claim.view][row] - expected).abs().max() < 2, claim
            num_claims += 1
    assert num_claims == 2 * 6 * STEPS > 1000


@every_backend
def test_without_excluded_images_all_others_keep_their_places_and_views(
    files: Files, backend: str, tmp_path: Path
) -> None:
    listed = tmp_path / "bad images.txt"
    left_out = [3, 11, 25]
    listed.write_text("".join(f"{files.paths[i]}\n" for i in left_out) + "\nnowhere.png\n")
    said = list[str]()
    whole = take(training_loader(files, backend, SPECS), 9)
    loader = training_loader(files, backend, SPECS, exclude=listed, max_bad=0, say=said.append)
    without = take(loader, 9)
    assert said[0] == (
        f"excludes 3 images of 26 by {listed}; 1 other line of it name no image here, the first nowhere.png"
    )
    assert not loader.bad
    for one, other in zip(whole, without, strict=True):
        assert torch.equal(one.index, other.index)
        for view, its in zip(one.views, other.views, strict=True):
            same = [torch.equal(a, b) for a, b in zip(view, its, strict=True)]
            assert same == [i not in left_out for i in one.index.tolist()]
    for i in left_out:  # they are never read
        Path(files.paths[i]).unlink()
    assert_same(take(training_loader(files, backend, SPECS, exclude=listed, max_bad=0), 9), without)


def test_a_list_is_read_in_any_spelling_or_refused_in_one_line(tmp_path: Path) -> None:
    paths = [tmp_path / "images" / f"{i} é.png" for i in range(4)]
    source = replace(by_path(paths), root=f"{tmp_path}/images/")
    listed = tmp_path / "list.txt"
    listed.write_bytes(f"\ufeff{paths[0]}\r\nimages/../images/1 é.png\r\n3 é.png".encode())
    assert exclusion.excluded(listed, source)[0].tolist() == [0, 1, 3]
    for text, words in (("", "names none of the 4 images"), ("a.png\n", "such as a.png: expected a path like")):
        listed.write_text(text)
        with raises_one_line(ConfigError, words):
            exclusion.excluded(listed, source)
    listed.write_text("\n".join(map(str, paths)))
    with raises_one_line(ConfigError, "names all 4 images"):
        exclusion.excluded(listed, source)
    with raises_one_line(MissingInput, "cannot be read: No such file"):
        exclusion.excluded(tmp_path / "none", source)
