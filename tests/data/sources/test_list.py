"""Lists of images: every form, the usual names of columns, splits, and what is refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.errors import raises_one_line
from kit.sources import relative
from sslx.data.sources import Source, build
from sslx.data.sources.list import Config
from sslx.errors import ConfigError, DataError, MissingInput

Make = Callable[..., Path]
NAMES = ("a b.png", "x/2.png", "x/3.png")


def built(root: Path, text: str, name: str = "list.csv", split: Any = "pretrain", **options: Any) -> Source:
    (root / name).write_text(text)
    return build(Config(root=root / name, **options), split)


FORMS = {
    "list.csv": "\ufefffile_name,class\na b.png,owl\nx/2.png,cat\n\nx/3.png,owl\n",
    "semicolons.csv": 'path;"label"\r\n"a b.png";owl\r\nx/2.png;cat\r\nx/3.png;owl\r\n',
    "list.tsv": "class\tPath\nowl\ta b.png\ncat\tx/2.png\nowl\tx/3.png\n",
    "list.jsonl": "\n".join(
        json.dumps({"image": name, "label": label}) for name, label in zip(NAMES, ("owl", "cat", "owl"), strict=True)
    ),
    "list.txt": "a b.png\towl\nx/2.png\tcat\nx/3.png\towl\n",
    "numbers.txt": "a b.png 10\nx/2.png 9\n\nx/3.png 10\n",
    "numbers.csv": "path,label\na b.png,10\nx/2.png,9\nx/3.png,10\n",
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_list(make: Make, name: str) -> None:
    root = make(*NAMES, "not/listed.png")
    source = built(root, FORMS[name], name)
    assert relative(source, root) == [*NAMES]
    assert source.facts.classes == (("9", "10") if name.startswith("numbers") else ("cat", "owl"))
    np.testing.assert_array_equal(source.facts.labels, [1, 0, 1])
    assert source.facts.size == 8
    assert source.describe().startswith(f"{root / name}: 3 images, 2 classes")


def test_splits_captions_and_chosen_columns(make: Make) -> None:
    root = make(*NAMES, "4.png", "5.png")
    text = "n,im,label,tags,split,text\n1,a b.png,0,x;y,train,an owl\n2,x/2.png,1,,Validation,a cat\n"
    text += "3,x/3.png,1,z,,a dog\n4,4.png,7,z,test,a fox\n5,5.png,1,z,test,a fox\n"
    source = built(root, text, path="im")
    assert relative(source, root) == ["a b.png", "x/3.png"]
    assert source.facts.captions == [("an owl",), ("a dog",)]
    assert "held out, not trained on: 3 images of the splits test and val" in source.notes
    test = build(Config(root=root / "list.csv", path="im"), "test", training=source)
    assert relative(test, root) == ["5.png"]
    np.testing.assert_array_equal(test.facts.labels, [1])
    assert any("lack their class, '7'" in note for note in test.notes)
    whole = built(root, text, path="im", split="test", label="n", test_root=root / "list.csv", caption="label")
    assert whole.facts.classes == ("4", "5")
    some = built(root, text, path="im", label="tags")
    assert some.facts.labels is not None
    assert built(root, "path,labels\n4.png,a;b\n5.png,a\n").describe().endswith("are not supported")
    missing = built(root, "path,label\n4.png,a\n5.png,\n")
    assert missing.describe().endswith(f"unlabeled: 1 image without a label, the first one {root}/5.png")
    elsewhere = built(root.parent, "path\n4.png\n4.png\n", base=root)
    assert relative(elsewhere, root) == ["4.png"] * 2
    assert "listed more than once: 1 image" in elsewhere.notes
    strange = built(root, "path,split\n4.png,extra\n5.png,train\n")
    assert strange.notes == ("trained on, although not of the split train: images of the split extra",)


@pytest.mark.parametrize(
    ("name", "text", "error", "words"),
    [
        (
            "a.csv",
            "path\n1.png\n2.png\n3.png\n",
            MissingInput,
            ("2 of the 3 images", "/2.png (line 3)", "--source.base"),
        ),
        ("a.csv", "img/1.png,cat\nimg/2.png,dog\n", DataError, ("'img/1.png', 'cat'", "--source.path")),
        ("a.csv", "path,label\n1.png,0\n1.png,0.5\n", DataError, ("1.png is 0.5", "a whole number or the name")),
        ("a.jsonl", '{"path": "1.png", "label": {"a": 1}}', DataError, ("1.png is {'a': 1}",)),
        ("a.jsonl", '{"path": "1.png"}\n{"path": 3}', DataError, ("line 2", "no path in its column 'path', but '3'")),
        ("a.jsonl", '{"path": "1.png"}\n[1]', DataError, ("line 2", "expected an object")),
        ("a.jsonl", '{"path": "1.png"}\n{"path"', DataError, ("line 2", "is not JSON")),
        ("a.csv", "path,label\n1.png\n", DataError, ("line 2", "has 1 cell, its header 2")),
        ("a.csv", "path,path\n1.png,1.png\n", DataError, ("several columns 'path'",)),
        ("a.csv", "path\n\0\n", DataError, ("a.csv",)),
        ("a.csv", "path,label\n", MissingInput, ("a.csv is empty",)),
        ("a.csv", "", MissingInput, ("a.csv is empty",)),
        ("a.txt", "\n\n", MissingInput, ("a.txt is empty",)),
        ("a.csv", "path,split\n1.png,test\n", MissingInput, ("no images to train on",)),
        ("a.xlsx", "path", DataError, ("'.xlsx'", ".csv, .tsv")),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    make: Make, name: str, text: str, error: type[Exception], words: tuple[str, ...]
) -> None:
    with raises_one_line(error, *words):
        built(make("1.png"), text, name)


def test_places_without_a_list_are_refused(make: Make) -> None:
    root = make("1.png")
    with raises_one_line(ConfigError, "--source.root FILE"):
        build(Config(), "pretrain")
    with raises_one_line(MissingInput, "is a folder, not a list"):
        build(Config(root=root), "pretrain")
    with raises_one_line(MissingInput, "does not exist"):
        build(Config(root=root / "list.csv"), "pretrain")
    with raises_one_line(MissingInput, "no test images", "--source.split", "--source.test-root"):
        built(root, "path\n1.png\n", split="test")
    with raises_one_line(DataError, "has no column 'klass' (--source.label): its columns are 'path'"):
        built(root, "path\n1.png\n", label="klass")
