"""Text from outside (names, paths, reasons, other libraries' messages) as one line of printable characters.

Whoever prints through rich wraps the result in ``rich.text.Text`` or says ``markup=False``: brackets stay brackets.
"""

import os
import re
import textwrap
from contextlib import suppress

_KEPT = re.compile(
    "[^\\S\n\r\t\v\f\x1c-\x1f\x85\u2028\u2029]|[\u200c\u200d]"
)  # spaces; the joiners of scripts and emoji
LIMIT = 400
"""Characters of a name or message that are shown."""


def shown(name: object, limit: int = LIMIT) -> str:
    """A path or another name from outside as one printable line, whatever bytes it holds.

    Bytes that are not UTF-8 are shown as ``\\xff``, control characters, line breaks and marks that turn the direction
    of text as ``\\n`` or ``\\u202e``; the middle of what is longer than ``limit`` is left out; all else stays as it is.
    """
    text = os.fsdecode(name) if isinstance(name, bytes | os.PathLike) else str(name)
    if len(text) > limit:
        half = max(1, (limit - 5) // 2)
        text = f"{text[:half]} ... {text[-half:]}"
    if text.isprintable():
        return text
    with suppress(UnicodeEncodeError):  # half a character, which is escaped below
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() or _KEPT.match(c) else _escaped(c) for c in text)


def one_line(message: object, limit: int = LIMIT) -> str:
    """A message of several lines as one: every run of spaces and line breaks is a space, and the rest as ``shown``."""
    return shown(" ".join(str(message)[: 10 * limit].split()), limit)


def wrapped(line: str, width: int) -> str:
    """A line for a terminal of so many columns, broken between words only; an indented one, a command, stays whole."""
    if line.startswith(" "):
        return line
    return textwrap.fill(line, max(20, width), break_long_words=False, break_on_hyphens=False)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def plural(count: int, noun: str, many: str = "") -> str:
    """A count and its noun: "1 step", "2,000 steps".  many: the plural where it is not the noun with an s."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"
