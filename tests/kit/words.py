"""What a run itself says on stderr, without the warnings of the libraries that it calls: those change with versions."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHONS = re.compile(r"^(?P<file>\S+\.py):\d+: \w*Warning: .*\n(?:  .*\n)?", re.MULTILINE)
TORCHS = re.compile(r"^(?:\[rank\d+\]:)?\[[WI]\d{3,4} .*\n", re.MULTILINE)  # [W1129 00:00:00.000 file.cpp:12] ...


def own(text: str) -> str:
    """The text without other people's warnings; warnings that come from files of this project stay."""
    return TORCHS.sub("", PYTHONS.sub(lambda m: m.group() if m["file"].startswith(str(ROOT / "sslx")) else "", text))
