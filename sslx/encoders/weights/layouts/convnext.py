"""The official code of ConvNeXt and ConvNeXt V2."""

from sslx.encoders.weights.layouts.base import Layout

LAYOUT = Layout(
    marks=(r"downsample_layers\.0\.0\.weight", r"stages\.0\.0\.dwconv\.weight"),
    renames=(
        (r"^downsample_layers\.0\.", "stem."),
        (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
        (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"\.dwconv\.", ".conv_dw."),
        (r"\.pwconv([12])\.", r".mlp.fc\1."),
        (r"\.grn\.gamma$", ".mlp.grn.weight"),
        (r"\.grn\.beta$", ".mlp.grn.bias"),
        (r"^norm\.", "head.norm."),
    ),
)
