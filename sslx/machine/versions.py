"""The package versions that sslx was tested with: all tests pass with the oldest set and with the newest."""

import platform
import re
from importlib import metadata

TESTED = {
    "torch": ("2.11.0", "2.15.0"),
    "torchvision": ("0.26.0", "0.29.2"),
    "triton": ("3.6.0", "3.9.0"),
    "nvidia-dali-cuda130": ("2.4.0", "2.4.0"),
    "timm": ("1.0.20", "1.0.31"),
    "wandb": ("0.27.0", "0.31.0"),
    "submitit": ("1.5.4", "1.5.4"),
    "tyro": ("1.0.14", "1.0.17"),
    "rich": ("13.0.0", "15.0.0"),
    "scipy": ("1.16.3", "1.17.1"),
    "scikit-learn": ("1.5.0", "1.9.1"),
    "matplotlib": ("3.8.0", "3.11.2"),
    "numpy": ("1.26.0", "2.4.6"),
    "pillow": ("11.2.1", "13.0.0"),
    "safetensors": ("0.4.5", "0.8.0"),
}
"""(oldest, newest) version of each package.  The oldest are the minimums in pyproject.toml and tests/oldest.txt."""


def installed() -> dict[str, str]:
    """Return the versions of Python and of the packages in ``TESTED`` that are installed."""
    versions = {"python": platform.python_version()}
    for name in TESTED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe(package: str, version: str) -> str:
    """Return the version of an installed package and the range that was tested."""
    oldest, newest = TESTED[package]
    if _key(version) < _key(oldest):
        return f"{version}: older than sslx supports: install {oldest} or newer"
    if _key(version) > _key(newest):
        return f"{version}: newer than sslx was tested with ({oldest} to {newest})"
    return f"{version} (tested: {oldest} to {newest})"


def _key(version: str) -> tuple[int, ...]:
    """Return the release numbers without trailing zeros: 2.14.1+cu130 -> (2, 14, 1), 2.15.0rc1 -> (2, 15)."""
    release = re.match(r"[\d.]*", version)
    numbers = [int(n) for n in re.findall(r"\d+", release.group() if release else "")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
