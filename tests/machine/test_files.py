"""Text files of every kind: what is read, what is refused in one line, and in what time."""

import os
import time
from pathlib import Path

import pytest

from sslx.errors import ConfigError
from sslx.machine import files


def test_text_with_and_without_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for data in ("über\r\n".encode(), "über\r\n".encode("utf-8-sig")):
        path.write_bytes(data)
        assert files.read_text(path) == "über\r\n"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("a".encode("utf-16"), "it is UTF-16: save it as UTF-8"),
        ("a".encode("utf-16-be"), "it has NUL characters: it is not text"),
        (b"ab\xfc", "byte 2 is not UTF-8: save it as UTF-8"),
        (b"a\0", "it has NUL characters: it is not text"),
        (b" " * (files.MAX_BYTES + 1), "it has more than 1,048,576 bytes"),
    ],
)
def test_what_is_no_text_is_refused_with_the_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"^(it|byte)") as caught:
        files.read_text(path)
    assert files.reason(caught.value) == reason


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # whose reader would wait for a writer
    for name, why in (("pipe", "it is not a regular file"), (".", "Is a directory"), ("none", "No such file or dir")):
        with pytest.raises((OSError, ValueError)) as caught:
            files.read_bytes(tmp_path / name)
        assert files.reason(caught.value).startswith(why)


DEEP = {
    "tables": "[" + ".".join("a" * 500_000) + "]",
    "quoted tables": "[" + ". ".join(['"a"', "'b'"] * 80_000) + "]",
    "inline tables": "x = " + "{a = " * 200_000,
    "lists": "x = " + "[" * 1_000_000,
    "lists over lines": "x = " + "[\n" * 500_000,
    "behind strings": '"\n' * 400_000 + "[" * 100_000,
    "dotted keys in inline tables": "x = " + "{a.a.a.a.a.a.a.a = " * 20,
}


@pytest.mark.parametrize("name", DEEP)
def test_nested_toml_costs_no_time(name: str) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match="nested more than 16 levels deep"):
        files.parse_toml(DEEP[name])
    assert time.process_time() - start < 2


@pytest.mark.parametrize("text", ["[" * 1_000_000, '{"a":' * 200_000, '{"a":' * 200_000 + "1" + "}" * 200_000])
def test_nested_json_costs_no_time(text: str) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match="nested more than 16 levels deep"):
        files.parse_json(text)
    assert time.process_time() - start < 2


def test_brackets_and_dots_in_strings_comments_and_numbers_are_no_nesting() -> None:
    text = (
        'a = "' + "[" * 40 + '\\""\nb = \'{{{{{{{{{{{{{{{{{{{{{{\'\nc = """\n' + "[.\n" * 30 + '"""\n'
        "d = '''\n\"[.[.[.[.[.[.[.[.[.[.[.[.[.[.[.[.[.[.[.[.[.'''\n# " + "a.[" * 30 + "\n"
        "e = [" + "0.5, " * 40 + "]\n[f.g]\nh.i = 1\n"
    )
    tree = files.parse_toml(text)
    assert (tree["a"], tree["e"], tree["f"]) == ("[" * 40 + '"', [0.5] * 40, {"g": {"h": {"i": 1}}})
    assert files.parse_json('{"a": "' + "[{." * 40 + '\\""}') == {"a": "[{." * 40 + '"'}


def test_json_is_an_object() -> None:
    assert files.parse_json('{"a": 1}'.encode("utf-8-sig")) == {"a": 1}
    for text, kind in (('[["a", 1]]', "a list"), ('"a"', "a string"), ("null", "null"), ("1", "a number")):
        with pytest.raises(ValueError, match=f"expected an object of names and values, got {kind}"):
            files.parse_json(text)
    for text, words in (("", "it is empty"), ("{", "Expect"), ('{"a": ' + "9" * 5000 + "}", "Exceeds")):
        with pytest.raises(ValueError, match=words):
            files.parse_json(text)


def test_replace_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.replace(path, b"old")
    files.replace(path, b"new")
    assert (path.read_bytes(), [p.name for p in tmp_path.iterdir()]) == (b"new", ["a"])
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        files.replace(tmp_path / "folder", b"x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "folder"]


def test_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/über")
    assert files.expanded("~") == Path("/home/über")
    assert files.expanded(Path("~/a")) == Path("/home/über/a")
    for path in ("a/~", "/~", "~no such user~/x", "a~"):
        assert files.expanded(path) == Path(path)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # nobody's
    with pytest.raises(ConfigError, match="no home directory: set HOME"):
        files.expanded("~/x")


def test_text_becomes_the_argument_that_a_shell_would_pass() -> None:
    assert files.as_argument("ü \udcff") == "ü \udcff"
    for text in ("\ud800", "a\0b"):
        with pytest.raises(ValueError, match=r"has (an unpaired|a NUL)"):
            files.as_argument(text)
