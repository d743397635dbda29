"""open_clip and OpenAI CLIP: the modified ResNet of the visual tower, timm's resnet50_clip and its like."""

import re

from sslx.encoders.weights.layouts.base import Layout

_KINDS = {"1": "conv1_1x1", "2": "conv2_kxk", "3": "conv3_1x1"}


def _layer(match: re.Match[str]) -> str:
    return f"stages.{int(match[1]) - 1}.{match[2]}.{_KINDS[match[4]]}.{match[3]}."


def _shortcut(match: re.Match[str]) -> str:
    return f"stages.{int(match[1]) - 1}.{match[2]}.shortcut.conv.{'conv' if match[3] == '0' else 'bn'}."


LAYOUT = Layout(
    marks=(r"conv3\.weight", r"layer1\.0\.conv3\.weight", r"attnpool\.q_proj\.weight"),
    renames=(
        (r"^(conv|bn)(\d)\.", r"stem.conv\2.\1."),
        (r"^layer(\d)\.(\d+)\.(conv|bn)(\d)\.", _layer),
        (r"^layer(\d)\.(\d+)\.downsample\.(\d)\.", _shortcut),
        (r"^attnpool\.positional_embedding$", "head.pos_embed"),
        (r"^attnpool\.([qkv])_proj\.", r"head.\1."),
        (r"^attnpool\.c_proj\.", "head.proj."),
    ),
)
