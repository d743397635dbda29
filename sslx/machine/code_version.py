"""The version of the code: release, commit, and a digest of the source files."""

import hashlib
import subprocess
from importlib import import_module
from pathlib import Path

from sslx import __version__


def code_version() -> str:
    """Return the version, the git commit if there is one, and a digest of the source files of sslx and its kernels."""
    command = ["git", "-C", str(_roots()[0]), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    return " ".join(filter(None, [__version__, commit, source_digest()]))


def source_digest() -> str:
    """Return a digest of the source files of sslx and its kernels."""
    digest = hashlib.sha256()
    for root in _roots():
        for path in sorted(root.rglob("*.py")) + sorted(root.rglob("*.toml")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _roots() -> list[Path]:
    return [Path(__file__).parents[1], Path(str(import_module("sslx_kernels").__file__)).parent]
