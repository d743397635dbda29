"""Text files: reading files from others, replacing our own, and expanding paths.  UTF-8 under every locale.

The size and nesting of a file are checked before a parser sees it, so that no file costs more than a moment.  Reading
raises OSError or ValueError; ``reason`` describes both in one line.
"""

import json
import os
import re
import stat
import tempfile
import tomllib
from pathlib import Path
from typing import Any, cast

from sslx.console.words import one_line
from sslx.errors import ConfigError

MAX_BYTES = 1 << 20
"""Maximum size of a file that is read as a whole: recipes, profiles and records have a few thousand bytes."""
MAX_NESTING = 16
"""Maximum nesting of tables and lists, and maximum number of parts of a dotted key."""

_TOKEN = re.compile(
    r'(?P<word>"""(?:[^\\]|\\.)*?(?:"""|\Z)|\'\'\'.*?(?:\'\'\'|\Z)|"(?:[^"\\\n]|\\.)*+(?:"|\n|\Z)|'
    r"'[^'\n]*+(?:'|\n|\Z)|[\w+-]++)|(?P<comment>\#[^\n]*+)|(?P<open>[\[{])|(?P<close>[\]}])|(?P<dot>\.)|[^ \t]",
    re.DOTALL,
)  # tokens of TOML, and so of JSON; the search takes linear time, whatever is left unclosed


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a regular file.  Raise ValueError if it is not one or exceeds ``max_bytes``, OSError if reading fails."""
    with open(path, "rb", opener=without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"it has more than {max_bytes:,} bytes")
    return data


def without_waiting(path: str, flags: int) -> int:
    """Open a file, as an ``opener`` that does not wait for a named pipe's writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """Read UTF-8 text, with or without a byte order mark.  Raise as ``read_bytes`` and ``decoded`` do."""
    return decoded(read_bytes(path, max_bytes))


def decoded(data: bytes) -> str:
    """Decode UTF-8 text, without its byte order mark.  Raise ValueError for other encodings and for NUL characters."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it is UTF-16: save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start:,} is not UTF-8: save it as UTF-8") from error
    if "\0" in text:
        raise ValueError("it has NUL characters: it is not text")
    return text


def parse_json(data: str | bytes) -> dict[str, Any]:
    """Parse the object in a JSON text.  Raise ValueError for anything else, or for more than MAX_NESTING levels."""
    text = decoded(data) if isinstance(data, bytes) else data
    if not text.strip():
        raise ValueError("it is empty")
    _check_nesting(text)
    tree: Any = json.loads(text)
    if not isinstance(tree, dict):
        raise ValueError(f"expected an object of names and values, got {_kind(tree)}")
    return cast("dict[str, Any]", tree)


def parse_toml(text: str) -> dict[str, Any]:
    """Parse a TOML text.  Raise ValueError if it is invalid or has more than MAX_NESTING levels."""
    _check_nesting(text)
    return tomllib.loads(text)


def _kind(tree: Any) -> str:
    return {list: "a list", str: "a string", type(None): "null"}.get(type(tree), "a number")


def _check_nesting(text: str) -> None:
    """Raise ValueError if tables, lists or dotted keys are too deep for the parsers, which recurse."""
    if text.count("[") + text.count("{") <= MAX_NESTING and text.count(".") <= MAX_NESTING:
        return
    depth = dots = 0
    for token in _TOKEN.finditer(text):
        if token.lastgroup == "dot":
            dots += 1
        elif token.lastgroup != "word":
            dots = 0
            depth += {"open": 1, "close": -1}.get(token.lastgroup or "", 0)
        if max(depth, dots) > MAX_NESTING:
            raise ValueError(f"it is nested more than {MAX_NESTING} levels deep")


def reason(error: Exception) -> str:
    """Say in one line, without the path, why a file could not be read or written."""
    return one_line((error.strerror if isinstance(error, OSError) else None) or error or type(error).__name__)


def replace(path: Path, data: bytes) -> None:
    """Write to a temporary file and rename it, so that a reader or a kill never meets a partial file."""
    temp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temp, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)


def cache(name: str) -> Path:
    """Return the folder of a kind of files that can be made again: ``name`` in sslx's part of the user's cache.

    Raise ConfigError as ``expanded`` does.  The folder may not exist yet.
    """
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "sslx" / name


def in_memory() -> int:
    """Return a descriptor of an empty file without a name, in memory where the system has such, else on a disk."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("sslx")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def expanded(path: str | os.PathLike[str]) -> Path:
    """Expand ``~`` and ``~user`` in a path.  Raise ConfigError if there is no home directory for ``~``."""
    text = os.path.expanduser(os.fspath(path))
    if text == "~" or text.startswith("~/"):
        raise ConfigError(f"{one_line(text)}: this user has no home directory: set HOME, or write the full path")
    return Path(text)


def as_argument(text: str) -> str:
    """Convert text from a UTF-8 file as if it had been passed as an argument, so that paths keep their bytes.

    In a UTF-8 locale, this changes nothing.  Raise ValueError for an unpaired surrogate or NUL, which no argument can
    hold.
    """
    try:
        argument = os.fsdecode(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError as error:
        raise ValueError(f"'{one_line(text, 60)}' has an unpaired surrogate") from error
    if "\0" in argument:
        raise ValueError(f"'{one_line(text, 60)}' has a NUL character")
    return argument
