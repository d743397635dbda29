"""lightly's own ResNetGenerator in an nn.Sequential: recognized and refused, because timm has no such model."""

from sslx.encoders.weights.layouts.base import Layout

LAYOUT = Layout(
    marks=(r"0\.weight", r"1\.running_mean", r"2\.0\.conv1\.weight", r"5\.0\.shortcut\.0\.weight"),
    refusal="lightly's ResNetGenerator in an nn.Sequential, which has no activation after its first convolution, as no "
    "model of timm: such a model is not supported",
)
