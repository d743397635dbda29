"""Transfer: the scores on further images are those of a probe of these images alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslx import cli
from sslx.errors import ConfigError
from sslx.probe import transfer

TRAIN = "simclr_digits --steps 2 --batch-size 64 --data.size 8 --encoder.channels 8 8 8 16 --online.every 0 --name run"
FEW = "--probe.shots 1 --probe.fractions --probe.num-draws 2 --probe.no-label-free".split()


@pytest.fixture
def shades(tmp_path: Path) -> Path:
    """A folder with two classes of random images, one of them darker."""
    random = np.random.default_rng()
    for kind, top in (("dark", 200), ("light", 256)):
        (tmp_path / "shades" / kind).mkdir(parents=True)
        for number in range(20):
            pixels = random.integers(0, top, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "shades" / kind / f"{number}.png")
    return tmp_path / "shades"


@pytest.mark.slow
def test_scores_are_those_of_a_probe_of_these_images_alone(
    tmp_path: Path, shades: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pretrain", *TRAIN.split(), "--runs", str(tmp_path)]) == 0
    run, probed = tmp_path / "run", tmp_path / "run" / "probe.json"
    alone = []
    for source in (["--source.name", "folder", "--source.root", str(shades)], []):
        assert cli.main(["probe", str(run), *source, *FEW]) == 0
        alone.append(json.loads(probed.read_text()))
        assert alone[-1]["transfer"] == []
    capsys.readouterr()
    assert cli.main(["probe", str(run), "--transfer", str(shades), "digits", *FEW]) == 0
    both = json.loads(probed.read_text())
    assert both["scores"] == alone[1]["scores"]
    assert [task["scores"] for task in both["transfer"]] == [record["scores"] for record in alone]
    assert [task["num_images"] for task in both["transfer"]] == [record["num_images"] for record in alone]
    assert both["transfer"][0]["images"] == str(shades)
    assert f"8 held-out training images of {shades}" in " ".join(capsys.readouterr().out.split())


def test_a_place_is_a_folder_or_a_source_or_both(tmp_path: Path) -> None:
    assert transfer.source_of(str(tmp_path)).place == transfer.source_of(f"folder={tmp_path}").place
    assert transfer.source_of("digits").name == "digits"
    assert str(tmp_path) in str(transfer.source_of(f"cifar10={tmp_path}").place)
    for place, words in (
        ("digitz", "expected a folder, or NAME or NAME=FOLDER of "),
        (f"digits={tmp_path}", "digits has no folder to give: use --transfer digits"),
    ):
        with pytest.raises(ConfigError, match=words):
            transfer.source_of(place)
