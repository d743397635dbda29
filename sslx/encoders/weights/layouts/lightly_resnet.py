"""lightly's own ResNetGenerator as nn.Sequential: the modules by number."""

import re

from sslx.encoders.weights.layouts.base import Layout


def _stage(match: re.Match[str]) -> str:
    return f"layer{int(match[1]) - 1}."


LAYOUT = Layout(
    marks=(r"0\.weight", r"1\.running_mean", r"2\.0\.conv1\.weight"),
    renames=(
        (r"^0\.", "conv1."),
        (r"^1\.", "bn1."),
        (r"^([2-5])\.", _stage),
        (r"\.shortcut\.", ".downsample."),
    ),
)
