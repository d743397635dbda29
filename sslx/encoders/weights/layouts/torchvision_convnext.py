"""torchvision ConvNeXt."""

import re

from sslx.encoders.weights.layouts.base import Layout


def _stage(match: re.Match[str]) -> str:
    stage, is_blocks = divmod(int(match[1]), 2)  # features.1, 3, 5, 7 are blocks, and features.2, 4, 6 are between them
    return f"stages.{stage}.{'blocks' if is_blocks else 'downsample'}.{match[2]}."


LAYOUT = Layout(
    marks=(r"features\.0\.0\.weight", r"features\.1\.0\.block\.0\.weight"),
    renames=(
        (r"^features\.0\.(\d)\.", r"stem.\1."),
        (r"^features\.(\d)\.(\d+)\.", _stage),
        (r"\.block\.0\.", ".conv_dw."),
        (r"\.block\.2\.", ".norm."),
        (r"\.block\.3\.", ".mlp.fc1."),
        (r"\.block\.5\.", ".mlp.fc2."),
        (r"\.layer_scale$", ".gamma"),
        (r"^classifier\.0\.", "head.norm."),
    ),
)
