"""The official code of DINOv3 (ViT)."""

from sslx.encoders.weights.layouts.base import Layout, without_key_bias

LAYOUT = Layout(
    marks=("storage_tokens", "patch_embed.proj.weight", r"blocks\.0\.ls1\.gamma"),
    renames=(
        (r"^storage_tokens$", "reg_token"),
        (r"\.ls([12])\.gamma$", r".gamma_\1"),
        (r"\.mlp\.w1\.", ".mlp.fc1_g."),
        (r"\.mlp\.w2\.", ".mlp.fc1_x."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
    ),
    reshape=without_key_bias,
)
