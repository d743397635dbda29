"""Group norm in place of batch norm.  It has no statistics over samples, so features do not depend on the batch."""

import math

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

CHANNELS_PER_GROUP = 16
"""From arXiv 1803.08494, table 3.  The paper's default of 32 groups would cut a head's 64 features into pairs, and
normalizing a pair leaves nothing but signs."""


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` with the ``drop`` and ``act`` of timm's BatchNormAct2d, for (N, C), (N, C, H, W), ..."""

    def __init__(self, num_groups: int, num_channels: int, eps: float, affine: bool) -> None:
        super().__init__(num_groups, num_channels, eps, affine)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the input (N, C, ...); the output has the same shape."""
        return self.act(self.drop(super().forward(input)))


def group_norm(module: nn.Module) -> nn.Module:
    """Replace every batch norm in the module (or the module itself) by a group norm that keeps its weight and bias."""
    if isinstance(module, _BatchNorm):
        channels = math.gcd(CHANNELS_PER_GROUP, module.num_features)
        groups = module.num_features // channels if channels >= 4 else 1
        converted = GroupNorm(groups, module.num_features, module.eps, module.affine)
        converted.weight, converted.bias = module.weight, module.bias
        converted.drop, converted.act = (getattr(module, name, nn.Identity()) for name in ("drop", "act"))
        return converted.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, group_norm(child))
    return module


def has_batch_norm(module: nn.Module) -> bool:
    """Return whether anything in the module normalizes over samples."""
    return any(isinstance(m, _BatchNorm) for m in module.modules())
