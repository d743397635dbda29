"""Files at addresses such as s3://bucket/train-000.tar, which fsspec reads: their names, sizes and contents.

The only importer of fsspec.  Credentials and other settings of a storage are where its library looks for them:
environment variables, its own files, and those of fsspec (~/.config/fsspec).
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from sslx.console.words import one_line, plural, shown
from sslx.data import retries, waiting
from sslx.errors import ConfigError, DataError, MissingInput, UserError

_AT_ONCE = 16  # questions to a storage
_CHANGES = (
    "ETag", "etag", "e_tag", "Last-Modified", "LastModified", "last_modified", "mtime", "md5Hash", "Content-MD5",
    "content_md5", "Digest", "generation", "updated",
)  # fmt: skip
"""What differs once a file has changed, by the names that the libraries of storages give it."""
Stamp = tuple[int, int]


def address_of(path: Path) -> str:
    """Return the address that a Path, which keeps only one of several slashes, was made of."""
    scheme, _, rest = str(path).partition(":/")
    return f"{scheme}:///{rest.lstrip('/')}" if scheme in ("file", "local") else f"{scheme}://{rest.lstrip('/')}"


def _opened(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path there.

    Raises ConfigError for an unknown scheme, and for one whose library is not installed.
    """
    scheme = address.partition("://")[0]
    try:
        fsspec: Any = import_module("fsspec.core")
        return fsspec.url_to_fs(address, **_options(scheme))
    except ImportError as error:
        raise ConfigError(f"{shown(address)} needs a package that is not installed: {one_line(error)}") from error
    except ValueError as error:
        raise ConfigError(
            f"{shown(address)} has an unknown scheme, {shown(scheme)}: expected one that fsspec reads, such as s3, gs, "
            f"az, http or file ({one_line(error)})"
        ) from error


def _options(scheme: str) -> dict[str, Any]:
    """Return what a library must be told: aiohttp would give up on a file that takes more than five minutes."""
    if scheme not in ("http", "https"):
        return {}
    try:
        limits: Any = import_module("aiohttp").ClientTimeout
    except ImportError as error:
        raise ImportError("pip install 'sslx[remote]', which brings aiohttp") from error
    return {"client_kwargs": {"timeout": limits(total=None, sock_connect=30, sock_read=60)}}


def named(address: str, patterns: Sequence[str], flag: str, suffixes: Sequence[str], timeout_s: float) -> list[str]:
    """Return the addresses of the files that these patterns name, each of a file, a folder or with wildcards.

    address: what the user wrote, for messages.  Raises MissingInput if there is none.
    """
    names: list[str] = []
    for pattern in patterns:
        system, path = _opened(pattern)
        if pattern.lower().partition("?")[0].endswith(tuple(suffixes)) and not re.search(r"[*[]", path):
            names.append(pattern)
            continue
        search = partial(system.glob, path) if re.search(r"[*[]", path) else partial(system.find, path)
        try:
            found: list[str] = _asked(search, pattern, timeout_s)
        except (FileNotFoundError, NotADirectoryError):
            found = []
        names += [system.unstrip_protocol(name) for name in sorted(found) if name.lower().endswith(tuple(suffixes))]
    if not names:
        raise MissingInput(f"{flag} {shown(address)} names no {' or '.join(suffixes)} file: check the address")
    return names


def stamps_of(addresses: Sequence[str], flag: str, timeout_s: float) -> list[Stamp]:
    """Return the size of each file and a number that changes with its contents, asking for several at a time.

    Raises MissingInput if some do not exist, DataError if the size is unknown, and StorageError.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        stamps = list(pool.map(partial(_stamp, timeout_s=timeout_s), addresses))
    if missing := [address for address, stamp in zip(addresses, stamps, strict=True) if stamp is None]:
        raise MissingInput(
            f"{len(missing):,} of the {plural(len(addresses), 'file')} that {flag} names do not exist, the first one "
            f"{shown(missing[0])}: restore them or change the pattern"
        )
    return [stamp for stamp in stamps if stamp is not None]


def _stamp(address: str, timeout_s: float) -> Stamp | None:
    try:
        return _asked(partial(current_stamp, address), address, timeout_s)
    except FileNotFoundError:
        return None


def current_stamp(address: str) -> Stamp:
    """Return the stamp of a file, asking once.  Raises FileNotFoundError, the errors of its library, and DataError."""
    waiting.sign_of_life()
    system, path = _opened(address)
    about: dict[str, Any] = system.info(path)
    if not isinstance(size := about.get("size"), int):
        raise DataError(f"the server does not say how large {shown(address)} is, so a cut copy would go unnoticed")
    changes = [about[name] for name in _CHANGES if about.get(name)] or [about.get("created")]
    text = repr([value.isoformat() if isinstance(value, datetime) else value for value in changes])
    return size, int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def copy(address: str, place: str) -> None:
    """Copy a file to a local place, with a sign of life for each piece.  Raises the errors of its library."""
    system, path = _opened(address)
    signs: Any = import_module("fsspec.callbacks").Callback()
    signs.relative_update = _sign
    system.get_file(path, place, callback=signs)


def _sign(_: int = 1) -> None:
    waiting.sign_of_life()


def open_file(address: str) -> Any:
    """Open a file to be read in parts.  Raises the errors of its library."""
    system, path = _opened(address)
    return system.open(path, "rb")


def _asked(question: Callable[[], Any], address: str, timeout_s: float) -> Any:
    """Return a storage's answer.  Raises FileNotFoundError, MissingInput for other refusals, and StorageError."""
    try:
        return retries.until_read(question, lambda: shown(address), timeout_s)
    except UserError:
        raise
    except Exception as error:  # the library of each storage has its own
        if isinstance(error, FileNotFoundError | NotADirectoryError) and error.__cause__ is None:
            raise
        reason = error.__cause__ or error
        if getattr(reason, "status", None) == 404:
            raise FileNotFoundError(address) from error
        raise MissingInput(f"{shown(address)} cannot be read: {one_line(reason) or type(reason).__name__}") from error
