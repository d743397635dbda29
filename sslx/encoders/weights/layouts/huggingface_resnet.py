"""Hugging Face ResNet."""

import re

from sslx.encoders.weights.layouts.base import Layout


def _stage(match: re.Match[str]) -> str:
    return f"layer{int(match[1]) + 1}.{match[2]}."


def _layer(match: re.Match[str]) -> str:
    return f".{'conv' if match[2] == 'convolution' else 'bn'}{int(match[1]) + 1}."


LAYOUT = Layout(
    marks=(r"embedder\.embedder\.convolution\.weight", r"encoder\.stages\.0\.layers\.0\.layer\.0\.convolution\.weight"),
    renames=(
        (r"^embedder\.embedder\.convolution\.", "conv1."),
        (r"^embedder\.embedder\.normalization\.", "bn1."),
        (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.", _stage),
        (r"\.layer\.(\d)\.(convolution|normalization)\.", _layer),
        (r"\.shortcut\.convolution\.", ".downsample.0."),
        (r"\.shortcut\.normalization\.", ".downsample.1."),
    ),
)
