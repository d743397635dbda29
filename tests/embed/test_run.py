"""``sslx embed``: each image that can be read has one row, on any number of ranks and however often it is stopped."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import RunOnRanks
from kit.processes import children, until
from sslx import cli, config, distributed
from sslx.embed import parts, run
from sslx.embed.parts import Parts
from sslx.runs import lock
from sslx.trained import load

READ = "--batch-size 5 --data.backend torchvision --data.threads 0 --data.max-bad 0.1 --device cpu".split()
NUM, BROKEN = 45, (7, 20)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of images, of which two are damaged."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(NUM):
        path = folder / ("cat" if i < 30 else "dog") / f"{i:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng().integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
        if i in BROKEN:
            path.write_bytes(path.read_bytes()[:50])
    return folder


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "LENGTH", 16)


def command(trained: Path, photos: Path, file: Path, *flags: str) -> list[str]:
    return ["embed", str(trained), "--source.root", str(photos), "-o", str(file), *READ, *flags]


def lines(file: Path) -> list[str]:
    return file.with_suffix(".csv").read_text().splitlines()[1:]


def test_rows_are_those_of_the_images_that_can_be_read(
    trained: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {dtype: tmp_path / f"{dtype}.npy" for dtype in ("fp32", "fp16")}
    for dtype, file in files.items():
        assert cli.main(command(trained, photos, file, "--dtype", dtype)) == 0
        out = capsys.readouterr().out
        assert f"wrote {file.with_suffix('.csv')}, {file}: 43 rows of 16" in out
        assert "left out 2 images that cannot be read" in out
        assert "rows/s (43 rows in" in out
        names = (tmp_path / f"{dtype}.npy.unreadable.txt").read_text().splitlines()
        assert [Path(name).name for name in names] == [f"{i:03}.png" for i in BROKEN]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{dtype}.{end}" for dtype in files for end in ("csv", "npy", "npy.unreadable.txt")
    )
    rows = [line.split(",") for line in lines(files["fp32"])]
    readable = [i for i in range(NUM) if i not in BROKEN]
    assert [int(row[0]) for row in rows] == readable
    assert [row[2:] for row in rows] == [["0", "cat"] if i < 30 else ["1", "dog"] for i in readable]
    vectors = np.load(files["fp32"])
    expected = load(trained).embed([row[1] for row in rows], as_numpy=True)
    np.testing.assert_allclose(vectors, expected, rtol=1e-5, atol=1e-6)
    half = np.load(files["fp16"])
    assert half.dtype == np.float16
    assert np.array_equal(half, vectors.astype(np.float16))


def on_a_rank(argv: list[str], length: int) -> Any:
    before, parts.LENGTH = parts.LENGTH, length
    trained = load(Path(argv[0]))
    options = config.load_embed(argv, trained.settings)
    try:
        run.write(trained, options, distributed.init("cpu"))
    except ValueError as error:
        return str(error)
    finally:
        parts.LENGTH = before
    return None


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_write_what_one_does(
    ranks: RunOnRanks, trained: Path, photos: Path, tmp_path: Path, world_size: int
) -> None:
    """With 2 ranks for 3 parts, and on 3 with 2 parts: one has none."""
    one, many = tmp_path / "one.npy", tmp_path / "many.npy"
    assert cli.main(command(trained, photos, one)) == 0
    argv = command(trained, photos, many)[1:]
    assert ranks(world_size, on_a_rank, argv, 16 if world_size == 2 else 25) == [None] * world_size
    assert lines(many) == lines(one)
    np.testing.assert_allclose(np.load(many), np.load(one), rtol=0, atol=1e-6)
    problems = ranks(world_size, on_a_rank, argv, 16)
    assert problems == [f"{many} exists: remove it, or name another file by --output"] * world_size


def test_a_run_that_failed_continues_with_the_parts_that_are_missing(
    trained: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the second part, then at the join; the same command continues both times."""
    whole, file = tmp_path / "whole.npy", tmp_path / "file.npy"
    assert cli.main(command(trained, photos, whole)) == 0
    write, written = Parts.write, list[int]()

    def failing(self: Parts, number: int, *tensors: Any) -> None:
        if number == 1 and not written.count(1):
            written.append(number)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(number)
        write(self, number, *tensors)

    monkeypatch.setattr(Parts, "write", failing)
    capsys.readouterr()
    argv = command(trained, photos, file)
    assert cli.main(argv) == 74
    error = capsys.readouterr().err
    assert error.splitlines()[-1].endswith("No space left on device; the same command continues")
    assert not file.exists()
    file.mkdir()
    assert cli.main(argv) == 74
    assert "continues: 1 of 3 parts are written already" in capsys.readouterr().out
    file.rmdir()
    assert cli.main(argv) == 0
    assert "continues: 3 of 3 parts are written already" in capsys.readouterr().out
    assert written == [0, 1, 1, 2]
    assert file.read_bytes() == whole.read_bytes()
    assert lines(file) == lines(whole)
    assert (tmp_path / "file.npy.unreadable.txt").read_text() == (tmp_path / "whole.npy.unreadable.txt").read_text()


@pytest.mark.soak
def test_parts_of_other_features_are_refused(
    trained: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.npy"
    folder = tmp_path / "file.npy.parts"
    assert cli.main(command(trained, photos, file)) == 0
    file.rename(tmp_path / "a.npy")
    for argv, words in (
        ([], "exists: remove it"),
        (["--output", str(tmp_path / "x.csv")], "must end in .parquet, .npy or .safetensors"),
    ):
        assert cli.main(command(trained, photos, file, *argv)) == 64
        assert words in capsys.readouterr().err
    file.with_suffix(".csv").unlink()
    trained_, options = load(trained), config.load_embed(command(trained, photos, file)[1:], load(trained).settings)
    source = options.source.build("pretrain", run.sources.Context())
    _, owner = parts.claim(file, parts.key_of(trained_, source, "fp32", None), len(source))
    assert cli.main(command(trained, photos, file)) == 64
    assert f"another process is writing {file}" in capsys.readouterr().err
    owner.release()
    for flags, words in (
        (["--dtype", "fp16"], "features of another --dtype"),
        (["--precision", "bf16"], "features of another precision"),
        (["--data.eval-size", "24"], "features of another preprocessing"),
        (["--source.root", str(photos / "cat"), "--dtype", "fp16"], "features of other images and another --dtype"),
    ):
        assert cli.main(command(trained, photos, file, *flags)) == 64
        error = capsys.readouterr().err
        assert f"error: {folder} has {words}: remove it to start anew" in error
    key = json.loads((folder / "key.json").read_text())
    (folder / "key.json").write_text(json.dumps(key | {"checkpoint": "0"}))
    assert cli.main(command(trained, photos, file)) == 64
    assert "features of another checkpoint:" in capsys.readouterr().err
    assert lock.read_owner(folder) is None


def test_features_that_are_not_finite_are_refused(trained: Path, photos: Path, tmp_path: Path) -> None:
    run_, file = load(trained), tmp_path / "file.npy"
    with torch.no_grad():
        next(iter(run_.encoder.parameters())).fill_(torch.nan)
    options = config.load_embed(command(trained, photos, file)[1:], run_.settings)
    with pytest.raises(ValueError, match="some of images 0 to 15 are NaN or infinite"):
        run.write(run_, options, distributed.init("cpu"))
    assert not file.exists()


WITH_SHORT_PARTS = """
import sys, time
from sslx import cli
from sslx.embed import parts
parts.LENGTH = 16
if "--slow" in sys.argv:
    sys.argv.remove("--slow")
    write = parts.Parts.write
    parts.Parts.write = lambda *arguments: (write(*arguments), time.sleep(1))
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_ranks_under_torchrun_that_are_killed_continue(trained: Path, photos: Path, tmp_path: Path) -> None:
    """SIGKILL to the launcher and both ranks once some parts are there; then the same command ends as one rank does."""
    one, file, script = tmp_path / "one.npy", tmp_path / "file.npy", tmp_path / "embed.py"
    script.write_text(WITH_SHORT_PARTS)
    assert cli.main(command(trained, photos, one)) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    argv = [*torchrun, *command(trained, photos, file, "--batch-size", "5")]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*argv, "--slow"], env=environ, start_new_session=True)
    written = tmp_path / "file.npy.parts"
    until(lambda: len(list(written.glob("*.safetensors"))) >= 1 or process.poll() is not None, "a part")
    for pid in (process.pid, *children(process.pid)):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert not file.exists()
    done = subprocess.run(argv, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "of 3 parts are written already" in done.stdout
    assert lines(file) == lines(one)
    np.testing.assert_allclose(np.load(file), np.load(one), rtol=0, atol=1e-6)
    assert not written.exists()
