"""Names from outside are shown in one line."""

import os
from pathlib import Path

import pytest

from sslx.console.words import one_line, shown, wrapped


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (b"cat/1.png", "cat/1.png"),
        (b"caf\xe9/\xff.png", r"caf\xe9/\xff.png"),
        ("ünï 日本 \U0001f408.jpg".encode(), "ünï 日本 \U0001f408.jpg"),
        (b"new\nline\ttab\x1b[31mred", r"new\nline\ttab\x1b[31mred"),
        ("a\u2028b\u2029c\u0085d\u202egnp.exe".encode(), r"a\u2028b\u2029c\x85d\u202egnp.exe"),
        (b"[bold]x[/bold] 100%", "[bold]x[/bold] 100%"),
        ("a\u00a0b".encode(), "a\u00a0b"),
    ],
)
def test_any_name_is_one_printable_line(name: bytes, line: str) -> None:
    assert shown(os.fsdecode(name)) == line
    assert shown(Path(os.fsdecode(name))) == line
    assert len(line.splitlines()) == 1
    shown(os.fsdecode(name)).encode("utf-8")  # no half of a surrogate pair is left that a terminal could not take


def test_half_a_character_other_spaces_and_joiners() -> None:
    assert shown("a\ud800\udcff") == r"a\ud800\udcff"
    for text in ("a\u3000b", "\U0001f469\u200d\U0001f52c", "C:\\new"):
        assert shown(text) == text
    assert shown(b"\x00\xff") == r"\x00\xff"


def test_the_middle_of_what_is_too_long_is_left_out() -> None:
    line = shown("a" * 50_000 + "b" * 50_000)
    assert (len(line), line[:100], line[-100:]) == (399, "a" * 100, "b" * 100)
    assert " ... " in line
    assert shown("x" * 400) == "x" * 400


def test_a_message_of_several_lines_is_one() -> None:
    assert one_line("first\n\n  second\tthird\x1b[0m\n") == r"first second third\x1b[0m"
    assert len(one_line("word\n" * 1_000_000)) < 500


def test_a_line_is_broken_between_words_and_a_command_is_not() -> None:
    text = "no test images: some-long-name/with-parts has none, or " + "x" * 60
    lines = wrapped(text, 40).split("\n")
    assert " ".join(lines) == text
    assert [len(line) <= 40 for line in lines] == [True, True, False], "what has no space is copied whole"
    assert wrapped(f"  sslx probe {'run ' * 20}", 40) == f"  sslx probe {'run ' * 20}"
