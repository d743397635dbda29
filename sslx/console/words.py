"""Turn text from outside (names, paths, reasons, messages of other libraries) into one line of printable characters.

Code that prints through rich wraps the result in ``rich.text.Text`` or passes ``markup=False``, so that brackets are
kept.
"""

import os
import re
import textwrap
from collections.abc import Sequence
from contextlib import suppress

_ALSO_PRINTED = re.compile(
    "[^\\S\n\r\t\v\f\x1c-\x1f\x85\u2028\u2029]|[\u200c\u200d]"
)  # spaces, and the joiners that scripts and emoji need
LIMIT = 400
"""Maximum number of characters of a name or message that are shown."""


def shown(name: object, limit: int = LIMIT) -> str:
    """Return a path or another name from outside as one printable line, whatever bytes it holds.

    Bytes that are not UTF-8 become ``\\xff``.  Control characters, line breaks and marks that change the direction of
    text become ``\\n`` or ``\\u202e``.  The middle of a text longer than ``limit`` is omitted.
    """
    text = os.fsdecode(name) if isinstance(name, bytes | os.PathLike) else str(name)
    if len(text) > limit:
        half = max(1, (limit - 5) // 2)
        text = f"{text[:half]} ... {text[-half:]}"
    if text.isprintable():
        return text
    with suppress(UnicodeEncodeError):  # an unpaired surrogate, which is escaped below
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() or _ALSO_PRINTED.match(c) else _escaped(c) for c in text)


def one_line(message: object, limit: int = LIMIT) -> str:
    """Join the lines of a message, collapse runs of spaces, and make the result printable like ``shown``."""
    return shown(" ".join(str(message)[: 10 * limit].split()), limit)


def wrapped(line: str, width: int) -> str:
    """Wrap a line between words for a terminal of this width; an indented line, such as a command, stays whole."""
    if line.startswith(" "):
        return line
    return textwrap.fill(line, max(20, width), break_long_words=False, break_on_hyphens=False)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def plural(count: int, noun: str, many: str = "") -> str:
    """Return a count with its noun: "1 step", "2,000 steps".  many: the plural, if it is not the noun with an s."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def first_of(values: Sequence[object], limit: int) -> str:
    """Join the first ``limit`` values with commas, followed by "..." if there are more."""
    texts = [str(value) for value in values[:limit]]
    if len(values) > limit:
        texts.append("...")
    return ", ".join(texts)
