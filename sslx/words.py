"""How names from outside are shown: always in one line of printable characters."""

import os
import unicodedata


def shown(name: str | os.PathLike[str]) -> str:
    """A path or another name from outside as one printable line, whatever bytes it holds.

    Bytes that are not UTF-8 are shown as ``\\xff``, control characters, line breaks and marks that turn the direction
    of text as ``\\n`` or ``\\u202e``; all else stays as it is.  Brackets stay too: print it without markup.
    """
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(_escaped(c) if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs") else c for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
