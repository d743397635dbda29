"""From a trained run to probes and pictures: sslx probe and sslx plot on a real checkpoint."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from conftest import RunOnRanks
from kit.processes import is_one_line
from sslx import cli, data
from sslx.config import load_plot, load_probe
from sslx.console.bars import Bars
from sslx.data import sources
from sslx.data.views import eval_view
from sslx.distributed import Ranks
from sslx.errors import NonFiniteError
from sslx.plot import pictures
from sslx.probe import images, represent, scores
from sslx.runs import checkpoint
from sslx.trained import load

FLAGS = (
    "simclr_digits --epochs 1 --batch-size 128 --data.size 8 --data.eval-size 12 --encoder.channels 8 8 16 32 "
    "--online.every 0 --name run"
).split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert cli.main(["pretrain", *FLAGS, "--runs", str(folder)]) == 0
    return folder / "run"


@pytest.mark.slow
def test_probe_prints_tables_and_writes_them_and_keeps_features_for_the_next_probe(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["probe", str(trained), "--probe.num-draws", "2"]
    assert cli.main(flags) == 0
    out = capsys.readouterr().out
    for word in ("raw pixels", "untrained encoder", "pretrained encoder", "10 labels", "10 % of", "LiDAR", "retrieval"):
        assert word in out
    record = json.loads((trained / "probe.json").read_text())
    scores = record["scores"]
    assert [score["name"] for score in scores] == ["raw pixels", "untrained encoder", "pretrained encoder"]
    for score in scores:
        assert 0.1 < score["linear"] <= 1
        assert 0.1 < score["knn"] <= 1
        assert score["low_shot"].keys() == {"1", "5", "10"}
        assert score["fractions"].keys() == {"0.01", "0.1"}
        assert score["knn_held_out"][str(score["k"])] == max(score["knn_held_out"].values())
    assert [row["name"] for row in record["label_free"]] == [score["name"] for score in scores]
    kept = sorted((trained / "features").iterdir())
    damaged, good = kept[4], kept[4].read_bytes()
    damaged.write_bytes(good[: len(good) // 2])
    few = ["--probe.no-linear", "--probe.shots", "--probe.fractions"]
    assert cli.main([*flags, *few]) == 0
    assert f"features: took 8 of 9 sets from {trained / 'features'}, computed 1" in capsys.readouterr().out
    assert damaged.read_bytes() == good, "replaced"
    again = json.loads((trained / "probe.json").read_text())
    assert again["label_free"] == record["label_free"]
    assert [score["knn"] for score in again["scores"]] == [score["knn"] for score in scores]
    with monkeypatch.context() as patch:
        patch.setattr(images, "loader", None)  # which would be called for features that are not kept
        patch.setattr(data, "in_order", None)
        other = "--no-baselines --probe.k 3 --probe.sgd --probe.no-linear --probe.shots --probe.fractions 0.2"
        assert cli.main([*flags, *other.split()]) == 0
    assert f"features: took 3 of 3 sets from {trained / 'features'}, computed none" in capsys.readouterr().out
    (score, *_) = json.loads((trained / "probe.json").read_text())["scores"]
    assert (score["k"], score["linear"], score["fractions"].keys()) == (3, None, {"0.2"})
    assert score["sgd"] > 0.4
    assert sorted((trained / "features").iterdir()) == kept


@pytest.mark.soak
def test_several_checkpoints_stand_side_by_side(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the same encoder before training as the first, and another method's augmentation."""
    flags = ["--steps", "2", "--name", "other", "--runs", str(tmp_path), "--method.name", "rotation"]
    flags += ["--average.momentum", "0.9"]
    assert cli.main(["pretrain", *FLAGS, *flags]) == 0
    few = ["--probe.shots", "--probe.fractions", "--probe.no-linear", "--source.name", "digits"]
    capsys.readouterr()
    assert cli.main(["probe", str(trained), str(tmp_path / "other"), *few]) == 0
    out = capsys.readouterr().out
    assert "2 checkpoints: accuracy in %" in out
    rows = [line.split("│")[1].strip() for line in out.splitlines() if "│" in line]
    names = ["raw pixels", "untrained encoder of run", "run", "other", "other, average"]
    assert rows[:5] == names, "baselines that both have are one row"
    assert rows == names * (len(rows) // 4)
    first, second = (json.loads((folder / "probe.json").read_text()) for folder in (trained, tmp_path / "other"))
    shared = ["raw pixels", "untrained encoder", "pretrained encoder"]
    for kind in ("scores", "label_free"):
        assert [row["name"] for row in first[kind]] == shared
        assert [row["name"] for row in second[kind]] == [*shared, "average of the encoder"]
        assert first[kind][:2] == second[kind][:2]
        assert first[kind][2] != second[kind][2]
        assert {**second[kind][3], "name": shared[2]} != second[kind][2], "other features"
    assert (first["step"], second["step"], second["augmented_as"]) == (11, 2, str(trained))
    assert cli.main(["compare", str(trained), str(tmp_path / "other")]) == 0
    out = capsys.readouterr().out
    assert "mean rank" in out
    assert "note: the runs differ" not in out
    assert cli.main(["probe", "--probe.k", "3"]) == 64
    is_one_line(capsys.readouterr().err, "sslx probe runs/NAME")


def test_features_that_are_not_finite_are_refused_by_name(trained: Path) -> None:
    run = load(trained)
    options = load_probe([str(trained), "--probe.cache-gb", "0"], run.settings)
    bars, ranks = Bars(Console(quiet=True), False), Ranks(device=torch.device("cpu"))
    with torch.no_grad():
        next(run.encoder.parameters())[0] = torch.nan
    of = represent.Representations(run, run.folder, run.views, options, ranks, bars)
    with pytest.raises(NonFiniteError, match=f"pretrained encoder of {trained}: expected finite features"):
        of.plain(represent.PRETRAINED, sources.build(run.settings.source, "test"))


def test_the_evaluation_view_is_the_checkpoints_and_the_same_for_both_splits(trained: Path) -> None:
    run = load(trained)
    assert run.view == eval_view(12), "trained at 8, probed at 12, as the config said"
    train, test = (sources.build(run.settings.source, split) for split in ("train", "test"))
    options = load_probe([str(trained)])
    ranks = Ranks(device=torch.device("cpu"))
    loaders = [images.loader(run.settings.data, of, run.view, 8, ranks, torch.float32) for of in (train, test, train)]
    (one,), (other,), (again,) = (next(loader).views for loader in loaders)
    assert one.shape == other.shape == (8, 3, 12, 12)
    assert torch.equal(one, again), "probes never augment"
    assert options.checkpoints == (trained,)


@pytest.mark.slow
def test_a_probe_at_another_size(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["probe", str(trained), "--no-baselines", "--probe.num-draws", "2"]
    records: list[dict[str, Any]] = []
    tuned = "--probe.fine-tune 0.01 --probe.fine-tune-lrs 0.05 --probe.num-fine-tune-draws 1".split()
    for size, more in (("12", []), ("16", tuned)):
        assert cli.main([*few, "--data.eval-size", size, *more]) == 0
        out = capsys.readouterr().out
        assert f"{size} px" in out
        assert ("fine-tuned on" in out) == ("fine-tuned: SGD as in SimCLR" in out) == bool(more)
        records.append(json.loads((trained / "probe.json").read_text()))
    assert [record["view_px"] for record in records] == [12, 16]
    assert records[0]["scores"] != records[1]["scores"]
    assert [list(record["scores"][0]["fine_tuned"]) for record in records] == [[], ["0.01"]]
    found = records[1]["scores"][0]["fine_tuned"]["0.01"]
    assert 0.1 < found["mean"] < 1
    assert (found["lr"], found["num_draws"], found["batch_size"], found["num_steps"]) == (0.05, 1, 8, 200)
    assert cli.main([*few, "--data.size", "16"]) == 64
    assert "--data.eval-size" in capsys.readouterr().err


def probe_on_a_rank(argv: list[str]) -> None:
    scores.score(argv, [Path(argv[0])])


def numbers(value: Any) -> list[float]:
    """All numbers in a value of JSON.  The last bits of features depend on the batch, and by them an image or two."""
    if isinstance(value, dict):
        return [number for one in value.values() for number in numbers(one)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.slow
def test_two_ranks_give_the_scores_of_one(ranks: RunOnRanks, trained: Path) -> None:
    few = "--device cpu --no-baselines --probe.cache-gb 0 --probe.num-views 2 --probe.shots --probe.fractions 0.1"
    argv = [str(trained), *few.split(), "--probe.num-fraction-draws", "2"]
    records = list[dict[str, Any]]()
    for world_size in (1, 2):
        if world_size == 1:
            probe_on_a_rank(argv)
        else:
            ranks(world_size, probe_on_a_rank, argv)
        records.append(json.loads((trained / "probe.json").read_text()))
        (trained / "probe.json").unlink()
    alone, together = records
    assert alone["scores"]
    for kind in ("scores", "label_free"):
        for one, two in zip(alone[kind], together[kind], strict=True):
            assert one.keys() == two.keys()
            for name in one.keys() - {"C", "k"}:  # chosen by accuracies that may be nearly the same
                assert numbers(two[name]) == pytest.approx(numbers(one[name]), abs=0.01), name


def test_untrained_encoder_is_the_one_that_training_started_from(trained: Path, tmp_path: Path) -> None:
    flags = ["--optim.lr", "1e-12", "--optim.weight-decay", "0", "--runs", str(tmp_path)]
    assert cli.main(["pretrain", *FLAGS, *flags]) == 0
    still = checkpoint.load(tmp_path / "run")["method"]
    run = load(trained)
    start, end = run.untrained_encoder(), run.encoder
    for name, parameter in start.named_parameters():
        torch.testing.assert_close(parameter.data, still[f"encoder.{name}"], rtol=0, atol=1e-6)
    assert not any(map(torch.equal, start.parameters(), end.parameters()))


@pytest.mark.soak
def test_plot_draws_two_pictures(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plot", str(trained), "--num-points", "200"]) == 0
    assert "tsne.png" in capsys.readouterr().out
    for name in ("tsne.png", "loss.png"):
        head = (trained / name).read_bytes()[:24]
        width, height = struct.unpack(">II", head[16:24])
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(width, height) > 400
    assert not (trained / "method.png").exists(), "SimCLR shows nothing of images"


@pytest.mark.slow
def test_plot_draws_what_the_method_shows_of_test_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "mae_digits --steps 2 --batch-size 32 --data.size 16 --data.eval-size 24 --encoder.patch 4 --name run"
    flags += " --encoder.layers 2 --encoder.channels 16 --method.decoder-dim 16 --method.decoder-layers 1"
    assert cli.main(["pretrain", *flags.split(), "--runs", str(tmp_path)]) == 0
    assert cli.main(["plot", str(tmp_path / "run"), "--num-points", "50"]) == 0
    assert "method.png" in capsys.readouterr().out
    run, cpu = load(tmp_path / "run"), torch.device("cpu")
    again, other = tmp_path / "again.png", tmp_path / "other.png"
    splits = images.splits(run, load_plot([str(run.folder)], run.settings), lambda _: None)
    assert splits.name == "test"
    for seed, path in ((0, again), (1, other)):
        options = load_plot([str(run.folder), "--seed", str(seed)], run.settings)
        assert pictures._method(pictures.Scene(run, options, splits, cpu), path)
    assert again.read_bytes() == (tmp_path / "run" / "method.png").read_bytes() != other.read_bytes()
    with Image.open(again) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    gray = np.abs(pixels - 255 * np.array(run.view.mean)).max(-1) < 2
    assert gray.sum() > 0.7 * 8 * 150**2, "three quarters of 8 images are masked"


def test_the_method_of_a_checkpoint_has_its_weights(trained: Path) -> None:
    run = load(trained)
    method = run.method()
    torch.testing.assert_close(method.state_dict(), dict(checkpoint.load(trained)["method"]), rtol=0, atol=0)
    assert not method.training


def test_probe_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["probe", str(tmp_path / "none")]) == 66
    is_one_line(capsys.readouterr().err, str(tmp_path / "none"))
