"""lightly's own ResNetGenerator as a whole."""

from sslx.encoders.weights.layouts.base import Layout

LAYOUT = Layout(
    marks=(r"bn1\.running_mean", r"layer1\.0\.conv1\.weight", r"layer2\.0\.shortcut\.0\.weight"),
    renames=((r"\.shortcut\.", ".downsample."), (r"^linear\.", "fc.")),
)
