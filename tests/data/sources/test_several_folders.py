"""Several folders at once: classes merged by name, weights, splits, exclusion, identity, and `sslx seen`."""

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kit.errors import raises_one_line
from kit.loaders import take, training_loader
from kit.sources import folder, paths_of
from sslx import cli, config
from sslx.data import Loader, exclusion
from sslx.data.facts import Share
from sslx.data.sources import Files, Source, build
from sslx.data.views import Augment, ViewSpec
from sslx.errors import ConfigError, DataError, MissingInput
from sslx.train import seen

Make = Callable[..., Path]
SPECS = (ViewSpec(size=8, augment=Augment()),)


@pytest.fixture
def roots(make: Make) -> tuple[Path, Path, Path]:
    """Three folders of 4, 3 and 8 images, with classes in common."""
    base = make("x/cat/1.png", "x/dog/2.png", "x/dog/3.png", "x/owl/4.png", "y/ant/5.png", "y/owl/6.png", "y/owl/7.png")
    make(*(f"z/{name}/{i}.png" for name in ("cat", "eel") for i in range(4)))
    for path in base.rglob("*.png"):
        Image.fromarray(np.random.default_rng().integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(path)
    return base / "x", base / "y", base / "z"


def names(source: Source) -> list[str]:
    return ["/".join(Path(path).parts[-3:]) for path in paths_of(source)]


def test_classes_are_merged_by_name(roots: tuple[Path, ...]) -> None:
    source = build(folder(roots), "pretrain")
    assert names(source)[:7] == [
        "x/cat/1.png", "x/dog/2.png", "x/dog/3.png", "x/owl/4.png", "y/ant/5.png", "y/owl/6.png", "y/owl/7.png",
    ]  # fmt: skip
    assert source.facts.classes == ("ant", "cat", "dog", "eel", "owl")
    np.testing.assert_array_equal(source.facts.labels, [1, 2, 2, 4, 0, 4, 4, *[1] * 4, *[3] * 4])
    assert source.facts.shares is None
    assert source.describe().startswith(f"{roots[0]}, {roots[1]}, {roots[2]}: 15 images, 5 classes")
    part = source.take(np.array([14, 0, 5]))
    assert names(part) == ["z/eel/3.png", "x/cat/1.png", "y/owl/6.png"]
    (roots[1] / "loose.png").write_bytes((roots[1] / "owl" / "6.png").read_bytes())
    loose = build(folder(roots), "pretrain")
    assert loose.describe().endswith(f"unlabeled: loose.png lies beside the folders in {roots[1]}")


def test_weights_are_facts_and_said(roots: tuple[Path, ...]) -> None:
    source = build(folder(roots, weights=(1, 2, 0.5)), "pretrain")
    assert source.facts.shares == tuple(
        Share(num_samples=count, weight=weight) for count, weight in ((4, 1), (3, 2), (8, 0.5))
    )
    assert source.notes[1] == f"of weight 2: {roots[1]}, 42.9% of an epoch's 14 images"
    loader = training_loader(source, "torchvision", SPECS, batch_size=7)
    counts = Counter(i for batch in take(loader, 2 * 4) for i in batch.index.tolist())
    assert [counts[i] for i in range(15)] == [4] * 4 + [8] * 3 + [2] * 8
    single = build(folder(roots[0], weights=(1.5,)), "pretrain")
    assert single.facts.num_per_epoch == 6
    assert build(folder(roots, weights=(1, 1, 1)), "pretrain").facts.shares is None
    assert build(folder(roots, weights=(1, 2, 3)), "pretrain").take(np.arange(3)).facts.shares is None


def test_each_folder_holds_out_its_own_test_images(make: Make) -> None:
    base = make("x/train/cat/1.png", "x/train/dog/2.png", "x/test/cat/3.png", "x/test/fox/4.png")
    make("y/train/cat/5.png", "y/train/eel/6.png", "y/val/eel/7.png", "z/ant/8.png")
    settings = folder((base / "x", base / "y", base / "z"))
    train = build(settings, "pretrain")
    assert names(train) == ["train/cat/1.png", "train/dog/2.png", "train/cat/5.png", "train/eel/6.png", "z/ant/8.png"]
    test = build(settings, "test", training=train)
    assert names(test) == ["test/cat/3.png", "val/eel/7.png"]
    assert test.facts.classes == train.facts.classes == ("ant", "cat", "dog", "eel")
    np.testing.assert_array_equal(test.facts.labels, [1, 3])
    assert any("lack their class, 'fox'" in note for note in test.notes)
    with raises_one_line(MissingInput, "no test images", "--source.test-root"):
        build(folder((base / "z", base / "x" / "train")), "test")


@pytest.mark.parametrize(
    ("which", "weights", "words"),
    [
        ((0, 1), (1.0,), ("one number for each folder of --source.root: 2, not 1",)),
        ((0, 1), (1.0, 0.0), ("above 0", "not 1.0 0.0")),
        ((0,), (float("nan"),), ("above 0",)),
        ((0, 1), (1.0, 2000.0), ("at most 1000",)),
    ],
)
def test_impossible_weights_are_one_line(
    roots: tuple[Path, ...], which: tuple[int, ...], weights: tuple[float, ...], words: tuple[str, ...]
) -> None:
    with raises_one_line(ConfigError, "--source.weights", *words):
        folder(tuple(roots[i] for i in which), weights=weights)


def test_folders_inside_each_other_are_refused(roots: tuple[Path, ...], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(roots[0] / "cat")
    for pair in ((roots[0], roots[0]), (roots[0].parent, roots[1]), (tmp_path / "link", roots[0])):
        with raises_one_line(ConfigError, "names images twice", "is part of", "--source.weights"):
            build(folder(pair), "pretrain")


def test_flags_name_one_folder_or_several(roots: tuple[Path, ...]) -> None:
    several = ["--source.root", *map(str, roots), "--source.weights", "1", "2", "0.5"]
    settings = config.parse([*several, "--steps", "1"], quiet=True)
    again = config.loads(config.dump(settings))
    assert vars(again.source) == vars(settings.source)
    assert again.source.place == ("folder", *map(str, roots))
    assert build(again.source, "pretrain").facts.num_per_epoch == 14
    one = config.loads(config.dump(config.parse(["--source.root", str(roots[0]), "--steps", "1"], quiet=True)))
    assert vars(one.source)["root"] == roots[0]
    with raises_one_line(ConfigError, "--source.weights", "1, not 2"):
        config.parse(["--source.root", str(roots[0]), "--source.weights", "1", "2"], quiet=True)


def test_a_checkpoint_knows_its_folders_wherever_they_are(roots: tuple[Path, ...], tmp_path: Path) -> None:
    def loader(*places: Path, weights: tuple[float, ...] = (1, 2, 0.5)) -> Loader:
        return training_loader(build(folder(places, weights=weights), "pretrain"), "synthetic", SPECS, batch_size=7)

    first = loader(*roots)
    next(first)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    (tmp_path / "moved").mkdir()
    moved = [root.rename(tmp_path / "moved" / f"{root.name}-elsewhere") for root in roots]
    loader(*moved).load_state_dict(state)
    with pytest.raises(DataError, match="new"):
        loader(moved[1], moved[0], moved[2]).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"--source\.weights"):
        loader(*moved, weights=(1, 2, 1)).load_state_dict(state)


def test_images_are_excluded_and_found_relative_to_any_of_the_folders(roots: tuple[Path, ...], tmp_path: Path) -> None:
    source = build(folder(roots, weights=(1, 2, 0.5)), "pretrain")
    assert isinstance(source, Files)
    listed = tmp_path / "list.txt"
    listed.write_text(f"owl/6.png\n{roots[2]}/eel/3.png\ncat/1.png\n")
    np.testing.assert_array_equal(exclusion.excluded(listed, source)[0], [0, 5, 14])
    assert seen.find(source, "owl/6.png") == 5
    assert seen.find(source, str(roots[2] / "eel" / "3.png")) == 14
    whole = take(training_loader(source, "torchvision", SPECS, batch_size=7), 6)
    for i in (0, 5, 14):
        Path(source.paths[i]).unlink()
    without = take(training_loader(source, "torchvision", SPECS, batch_size=7, exclude=listed, max_bad=0), 6)
    for one, other in zip(whole, without, strict=True):
        assert torch.equal(one.index, other.index)
        same = [torch.equal(a, b) for a, b in zip(one.views[0], other.views[0], strict=True)]
        assert [i for i, kept in zip(one.index.tolist(), same, strict=True) if not kept] == [
            i for i in one.index.tolist() if i in (0, 5, 14)
        ]


@pytest.mark.slow
def test_a_run_on_weighted_folders_and_what_was_seen(
    roots: tuple[Path, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--source.weights 1 2 0.5 --encoder.layers 1 1 1 1 --encoder.channels 8 8 8 16 --data.size 16 --steps 6 "
    flags += f"--batch-size 7 --data.backend torchvision --data.threads 0 --device cpu --runs {tmp_path} --name r"
    argv = ["pretrain", "--source.root", *map(str, roots), *flags.split(), "--online.every", "0", "--health.every", "0"]
    assert cli.main(argv) == 0
    capsys.readouterr()
    assert cli.main(["seen", str(tmp_path / "r"), "owl/7.png"]) == 0
    said = capsys.readouterr().out
    assert "12 views in 3 epochs of the 6 steps" in said, said
