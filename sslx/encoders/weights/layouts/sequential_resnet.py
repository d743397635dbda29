"""A torchvision ResNet as nn.Sequential, which is lightly's usual backbone: the modules by number."""

import re

from sslx.encoders.weights.layouts.base import Layout


def _stage(match: re.Match[str]) -> str:
    return f"layer{int(match[1]) - 3}."  # 2 and 3 are the activation and the max-pool, which have no tensors


LAYOUT = Layout(
    marks=(r"0\.weight", r"1\.running_mean", r"4\.0\.conv1\.weight"),
    renames=((r"^0\.", "conv1."), (r"^1\.", "bn1."), (r"^([4-7])\.", _stage)),
)
