"""The official code of DINOv2: registers, SwiGLU, and blocks in chunks as its training code saves them."""

from sslx.encoders.weights.layouts.base import Layout, class_position_into_token

LAYOUT = Layout(
    marks=("mask_token", "patch_embed.proj.weight", r"blocks\.(?:0\.)?0\.ls1\.gamma"),
    renames=(
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
        (r"^register_tokens$", "reg_token"),
        (r"\.mlp\.w12\.", ".mlp.fc1."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
    ),
    reshape=class_position_into_token,
)
