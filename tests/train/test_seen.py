"""``sslx seen``: its claims about a run, some of whose images were unreadable or excluded, against its batches."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kit.errors import raises_one_line
from kit.runs import Run
from sslx import cli
from sslx.data.loader import Loader
from sslx.errors import DataError
from sslx.train import seen
from sslx.trained import load


def test_what_is_seen_is_what_was_read(
    here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    random = np.random.default_rng()
    for i in range(20):
        path = images / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    (images / "a" / "04.png").write_bytes(b"no image")
    (tmp_path / "list").write_text("a/02.png\nb/11.png\n")
    read, deliver = list[list[int]](), Loader.__next__

    def noted(loader: Loader):  # the images that are read for each batch
        batch = deliver(loader)
        read.append(loader._quarantine.substitute(batch.index.numpy()).tolist())
        return batch

    monkeypatch.setattr(Loader, "__next__", noted)
    flags = f"--source.name folder --source.root {images} --data.backend torchvision --data.threads 0 --steps 7"
    flags += f" --batch-size 8 --num-micro-batches 2 --data.exclude {tmp_path / 'list'} --data.max-bad 0.1"
    flags += " --augment.vertical-flip 1 --augment.right-angles 1 --augment.gain 1 --augment.noise 1"
    assert here(*flags.split(), "--health.every", "0")[0] == 0
    assert len(read) == 14
    run = tmp_path / "r"
    trained = load(run)
    source = trained.settings.source.build("pretrain", seen.sources.Context())
    names = [Path(source.path(i)).name for i in range(20)]
    unread = {names.index(name) for name in ("02.png", "04.png", "11.png")}
    for index in set(range(20)) - unread:
        claimed = Counter(one.step for one in seen.appearances(trained, source, index))
        truth = Counter(1 + t // 2 for t, batch in enumerate(read) for i in batch if i == index)
        assert claimed == {step: 2 * count for step, count in truth.items()}, names[index]  # two views
    stand_in = next(i for i in range(20) if any(one.sample in unread for one in seen.appearances(trained, source, i)))
    capfd.readouterr()
    assert cli.main(["seen", str(run), names[stand_in], "-o", str(tmp_path / "seen.json")]) == 0
    out = capfd.readouterr().out
    assert f"{names[stand_in]}: " in out
    assert "in place of" in out
    assert "vertically" in out
    assert set(re.findall(r"\S+(?=°)", out)) <= {"90.0", "180.0", "-90.0"}
    assert "°" in out
    written = json.loads((tmp_path / "seen.json").read_text())
    assert {one["sample"] for one in written} & unread
    assert written[0].keys() == {"step", "epoch", "view", "sample", "box", "draws"}
    draws = written[0]["draws"]
    assert draws["quarter_turns"] in (1, 2, 3)
    assert (len(draws["gain"]), len(draws["noise_key"]), draws["noise"] > 0) == (3, 2, True)
    assert cli.main(["seen", str(run), str(images / "a" / "02.png")]) == 0
    assert "in none of the 7 steps" in capfd.readouterr().out


def test_an_image_is_found_by_any_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kit.sources import by_path

    for name in ("a/1.png", "b/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link.png").symlink_to(tmp_path / "b/2.png")
    source = by_path([tmp_path / name for name in ("a/1.png", "b/1.png", "b/2.png")])
    monkeypatch.chdir(tmp_path / "b")
    for spelling in ("2", f"{tmp_path}/b/2.png", "2.png", "../b/2.png", "../link.png", "b/2.png"):
        assert seen.find(source, spelling) == 2, spelling
    monkeypatch.chdir("/")
    for spelling, words in (("1.png", "2 images of files end in 1.png"), ("c.png", "not among the 3 images of files")):
        with raises_one_line(DataError, words):
            seen.find(source, spelling)
