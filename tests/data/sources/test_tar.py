"""Tar shards: what is an image, a label or a caption in them, and indexes that are kept, shared and made again."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kit.containers import tar
from kit.errors import raises_one_line
from kit.image_files import encoded
from kit.loaders import training_loader
from sslx.data.sources import Encoded, Source, build, shards
from sslx.data.sources.tar import Config, opened
from sslx.data.views import ViewSpec
from sslx.errors import ConfigError, DataError, MissingInput


def image(side: int = 20, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng().integers(0, 256, (side, side, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), kind)


def read(source: Source) -> list[bytes]:
    assert isinstance(source, Encoded)
    return list(source.files(np.arange(len(source))))  # pyright: ignore[reportArgumentType]


def built(root: Path, split: Any = "pretrain", **options: Any) -> Source:
    return build(Config(root=root, **options), split)


def test_members_make_samples_by_their_names_up_to_the_first_dot(tmp_path: Path) -> None:
    first, second, third = image(), image(kind="JPEG"), image(40)
    text = {"label": "owl", "caption": ["an owl", "a bird"]}
    members = [("a.b/1.jpg", second), ("a.b/1.json", json.dumps(text).encode()), ("a.b/2.json", b'{"label": "cat"}')]
    members += [("a.b/2.PNG", first), ("a.b/2.left.png", third), ("a.b/._2.png", b"x"), ("readme.md", b"hi")]
    members += [("3.txt", b"keine Eule\n"), ("a.b/4.json", b"{}")]
    source = built(tar(tmp_path / "x.tar", members))
    assert read(source) == [second, first]
    assert source.facts.classes == ("cat", "owl")
    np.testing.assert_array_equal(source.facts.labels, [1, 0])
    assert [source.where(i) for i in (0, 1)] == [f"{tmp_path}/x.tar!a.b/1.jpg", f"{tmp_path}/x.tar!a.b/2.png"]
    assert any("no captions for all: 1 image without, the first one " in note for note in source.notes)
    assert "left out: 2 samples without an image" in source.notes
    assert source.facts.size == 16
    left = built(tmp_path / "x.tar", image="left.png")
    assert read(left) == [third]
    assert left.facts.labels is not None
    captioned = built(
        tar(tmp_path / "y.tar", [*members[:2], ("5.txt", b" five\n"), ("5.png", first)]), caption="caption"
    )
    assert captioned.facts.captions is None
    captioned = built(tar(tmp_path / "z.tar", members[:2]))
    assert captioned.facts.captions == [("an owl", "a bird")]
    texts = built(tar(tmp_path / "t.tar", [("5.txt", b" five\n"), ("5.png", first)]))
    assert texts.facts.captions == [("five",)]


def test_folders_in_a_tar_file_are_classes_and_files_named_like_splits_are_held_out(tmp_path: Path) -> None:
    images = [image() for _ in range(6)]
    names = ["dog/1.png", "cat/2.png", "dog/3.png", "cat/4.png"]
    tar(tmp_path / "train-000.tar", zip(names[:2], images[:2], strict=True))
    tar(tmp_path / "train-001.tar", zip(names[2:], images[2:4], strict=True))
    tar(tmp_path / "val-000.tar", [("cat/9.png", images[4]), ("wolf/8.png", images[5])])
    source = built(tmp_path)
    assert read(source) == images[:4]
    assert source.facts.classes == ("cat", "dog")
    np.testing.assert_array_equal(source.facts.blocks, [0, 2])
    assert any("held out, not trained on: 1 file such as" in note for note in source.notes)
    test = build(Config(root=tmp_path), "test", training=source)
    assert read(test) == images[4:5]
    assert any("lack their class, 'wolf'" in note for note in test.notes)
    assert len(built(tmp_path, splits="none")) == 6
    assert read(built(tmp_path / "train-{000..001}.tar")) == images[:4]
    assert read(built(tmp_path / "{train-001,val-000}.tar", splits="none")) == images[2:]
    assert read(built(tmp_path / "train-*.tar")) == images[:4]
    with raises_one_line(MissingInput, "1 of the 3 files", "train-002.tar"):
        built(tmp_path / "train-{000..002}.tar")
    (tmp_path / "again").symlink_to(tmp_path)
    assert len(built(tmp_path, splits="none")) == 6, "a link back up is not followed for ever"


def test_links_in_a_tar_file_are_counted(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(image())
    os.link(tmp_path / "1.png", tmp_path / "2.png")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("1.png", "2.png"):
            archive.add(tmp_path / name, name)
    assert "left out: 1 link to other members" in built(tmp_path / "x.tar").notes


def test_an_index_is_kept_and_made_again_when_its_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    old, new = image(), image()
    file = tar(tmp_path / "data" / "x.tar", [("1.png", old), ("1.cls", b"3")])
    status = os.stat(file)
    assert read(built(file)) == [old]
    beside = Path(f"{file}{shards.SUFFIX}")
    assert beside.is_file()
    changed = file.read_bytes().replace(b"3" + bytes(511), b"8" + bytes(511))  # the same size and time
    file.write_bytes(changed)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert built(file).facts.classes == ("3",)
    beside.write_bytes(beside.read_bytes()[:200])
    assert built(file).facts.classes == ("8",), "a damaged index is made again"
    tar(file, [("1.png", old), ("2.png", new), ("2.cls", b"5"), ("1.cls", b"4")])
    assert built(file).facts.classes == ("4", "5")
    beside.unlink()
    beside.mkdir()  # so that nothing can be written there, as in a folder without permission
    assert read(built(file)) == [old, new]
    (kept,) = (tmp_path / "cache" / "sslx" / "indexes").iterdir()
    written = kept.stat().st_mtime_ns
    assert read(built(file)) == [old, new]
    assert kept.stat().st_mtime_ns == written


@pytest.mark.slow
def test_several_processes_index_the_same_files_at_once(tmp_path: Path) -> None:
    """Two processes that start together, as ranks do, and find the same images."""
    for number in range(6):
        tar(tmp_path / f"{number}.tar", [(f"{i}.png", image()) for i in range(20)])
    code = (
        "import sys; from pathlib import Path; from sslx.data.sources import build, tar; "
        "s = build(tar.Config(root=Path(sys.argv[1])), 'pretrain'); print(len(s), s.identity()['digest'])"
    )
    starts = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(2)]
    answers = {start.communicate()[0] for start in starts}
    assert len(answers) == 1
    assert answers.pop().startswith(b"120 ")
    assert len([*tmp_path.iterdir()]) == 12, "one index each, and no temporary files"


def test_a_shard_that_changes_or_goes_is_named_for_each_image_and_nothing_else_is_read(tmp_path: Path) -> None:
    for number in range(3):
        tar(tmp_path / f"{number}.tar", [(f"{i}.png", image()) for i in range(8)])
    source = built(tmp_path)
    tar(tmp_path / "1.tar", [(f"{i}.png", image(21)) for i in range(9)])
    (tmp_path / "2.tar").unlink()
    opened.cache_clear()  # as in a worker process that has not opened it yet; an open file stays readable
    lines: list[str] = []
    loader = training_loader(source, "torchvision", (ViewSpec(size=8),), threads=0, max_bad=0.9, say=lines.append)
    for _ in range(4):
        next(loader)
    assert {Path(name.partition("!")[0]).name for name in loader.bad.values()} == {"1.tar", "2.tar"}
    assert any("its tar file has changed since it was indexed" in line for line in lines)
    assert any("No such file" in line for line in lines)


def damaged(kind: str, whole: bytes, start: int) -> bytes:
    """A tar file's bytes, damaged at its second member, whose header begins at ``start``."""
    size = slice(start + 124, start + 135)
    if kind == "cut":
        return whole[: start + 700]
    if kind == "cut between members":
        return whole[:start]
    if kind == "larger":
        return whole[: size.start] + b"00000007777" + whole[size.stop :]
    if kind == "much larger":
        return whole[: size.start] + b"00777777777" + whole[size.stop :]
    if kind == "smaller":
        return whole[: size.start] + b"00000000001" + whole[size.stop :]
    return {"empty": b"", "compressed": b"\x1f\x8b" + whole, "other": b"x" * 5000}[kind]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("cut", "is cut or damaged behind its member 2.png"),
        ("cut between members", "ends behind its member 1.png of .* without the mark of its end: it was cut"),
        ("larger", "is damaged behind its member 2.png of 4,095 bytes"),
        ("much larger", "is cut or damaged behind its member 2.png of 134,217,727 bytes"),
        ("smaller", "is damaged behind its member 2.png of 1 byte"),
        ("empty", "x.tar is empty"),
        ("compressed", "is compressed by gzip: unpack it once"),
        ("other", "is not a tar file"),
    ],
)
def test_a_damaged_shard_is_refused_in_one_line(kind: str, words: str, tmp_path: Path) -> None:
    """Checksums are made good, as those of a member that lies about its size are."""
    content = [image(30), image(31), image(32)]
    file = tar(tmp_path / "x.tar", [(f"{i + 1}.png", content[i]) for i in range(3)])
    start = 512 + -(-len(content[0]) // 512) * 512
    raw = bytearray(damaged(kind, file.read_bytes(), start))
    if kind in ("larger", "much larger", "smaller"):
        raw[start + 148 : start + 156] = b" " * 8
        raw[start + 148 : start + 156] = b"%06o\0 " % sum(raw[start : start + 512])
    file.write_bytes(bytes(raw))
    with pytest.raises(DataError, match=words) as raised:
        built(file)
    assert "\n" not in str(raised.value)


def test_what_cannot_be_used_is_refused_in_one_line(tmp_path: Path) -> None:
    texts = tar(tmp_path / "texts.tar", [("1.txt", b"x"), ("1.cls", b"1")])
    with raises_one_line(MissingInput, "no images in 1 tar file such as", "texts.tar", "only texts"):
        built(texts)
    several = tar(tmp_path / "several.tar", [("a.jpg", image()), ("a.png", image())])
    with raises_one_line(ConfigError, "the sample a of", "'jpg', 'png'", "--source.image"):
        built(several)
    fraction = tar(tmp_path / "half.tar", [("a.png", image()), ("a.cls", b"0.5")])
    with raises_one_line(DataError, "half.tar!a.png is 0.5", "expected a whole number or the name"):
        built(fraction)
    json_label = tar(tmp_path / "json.tar", [("a.png", image()), ("a.json", b'{"label": {"x": 1}, "id": 3}')])
    with raises_one_line(DataError, "json.tar!a.png is {'x': 1}"):
        built(json_label)
    with raises_one_line(DataError, "has no column 'klass' (--source.label)", "'label', 'id'"):
        built(json_label, label="klass")
    assert built(json_label, label="id").facts.classes == ("3",)
    with raises_one_line(ConfigError, "--source.name tar needs --source.root"):
        build(Config(), "pretrain")
    with raises_one_line(MissingInput, "names no file"):
        built(tmp_path / "no.tar")
    with raises_one_line(DataError, "expected .tar files", "x.zip"):
        (tmp_path / "x.zip").write_bytes(b"x")
        built(tmp_path / "x.zip")
    with raises_one_line(MissingInput, "no test images"):
        built(texts, "test")
