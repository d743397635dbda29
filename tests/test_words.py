"""Names from outside are shown in one line."""

import os
from pathlib import Path

import pytest

from sslx.words import shown


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
