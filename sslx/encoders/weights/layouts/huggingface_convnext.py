"""Hugging Face ConvNeXt and ConvNeXt V2."""

from sslx.encoders.weights.layouts.base import Layout

LAYOUT = Layout(
    marks=(r"embeddings\.patch_embeddings\.weight", r"encoder\.stages\.0\.layers\.0\.dwconv\.weight"),
    renames=(
        (r"^embeddings\.patch_embeddings\.", "stem.0."),
        (r"^embeddings\.layernorm\.", "stem.1."),
        (r"^encoder\.stages\.(\d+)\.layers\.", r"stages.\1.blocks."),
        (r"^encoder\.stages\.(\d+)\.downsampling_layer\.", r"stages.\1.downsample."),
        (r"\.dwconv\.", ".conv_dw."),
        (r"\.layernorm\.", ".norm."),
        (r"\.pwconv([12])\.", r".mlp.fc\1."),
        (r"\.grn\.", ".mlp.grn."),
        (r"\.layer_scale_parameter$", ".gamma"),
        (r"^layernorm\.", "head.norm."),
    ),
)
