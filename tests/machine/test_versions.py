"""The versions that sslx was tested with: one list, which agrees with the floors and with the oldest set."""

import re
import tomllib
from pathlib import Path

import pytest

from sslx.machine import versions

ROOT = Path(__file__).parents[2]


def test_the_oldest_set_is_what_is_asked_for_and_what_is_tested() -> None:
    floors_of_sslx = (ROOT / "tests" / "oldest.txt").read_text().split("\n#")[0]  # then comes what goes with them
    pinned = dict(line.split("==") for line in floors_of_sslx.splitlines() if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]["parquet"] + project["optional-dependencies"]["formats"]
    for name, floor in (line.split(">=") for line in extras):  # newer ones need another numpy and do not all say so
        assert versions._key(pinned.pop(name)) == versions._key(floor), name
    assert pinned == {name: oldest for name, (oldest, _) in versions.TESTED.items()}
    floors: dict[str, str] = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in project["dependencies"])
    assert floors.keys() <= versions.TESTED.keys()
    for name, (oldest, newest) in versions.TESTED.items():
        assert versions._key(floors.get(name, oldest)) == versions._key(oldest) <= versions._key(newest), name


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("2.10.9", "2.10.9: older than sslx supports: install 2.11.0 or newer"),
        ("2.11", "2.11 (tested: 2.11.0 to 2.14.1)"),
        ("2.14.1+cu130", "2.14.1+cu130 (tested: 2.11.0 to 2.14.1)"),
        ("2.14.2", "2.14.2: newer than sslx was tested with (2.11.0 to 2.14.1)"),
        ("2.15.0a0+git123", "2.15.0a0+git123: newer than sslx was tested with (2.11.0 to 2.14.1)"),
        ("10.0", "10.0: newer than sslx was tested with (2.11.0 to 2.14.1)"),
    ],
)
def test_versions_outside_are_named(version: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(versions.TESTED, "torch", ("2.11.0", "2.14.1"))
    assert versions.describe("torch", version) == words
