"""Group norm in the place of batch norm: no statistics over samples, so nothing depends on how a batch is cut."""

import math

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

CHANNELS = 16
"""In a group (arXiv 1803.08494, table 3).  The paper's 32 groups leave a head's 64 features in pairs, of which only the
signs survive."""


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` with the ``drop`` and ``act`` of timm's BatchNormAct2d: (N, C), (N, C, H, W), ..."""

    def __init__(self, num_groups: int, num_channels: int, eps: float, affine: bool) -> None:
        super().__init__(num_groups, num_channels, eps, affine)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> the same shape."""
        return self.act(self.drop(super().forward(input)))


def group_norm(module: nn.Module) -> nn.Module:
    """Replace every batch norm in the module (or itself) by a group norm; weights and biases stay as they are."""
    if isinstance(module, _BatchNorm):
        channels = math.gcd(CHANNELS, module.num_features)
        groups = module.num_features // channels if channels >= 4 else 1
        converted = GroupNorm(groups, module.num_features, module.eps, module.affine)
        converted.weight, converted.bias = module.weight, module.bias
        converted.drop, converted.act = (getattr(module, name, nn.Identity()) for name in ("drop", "act"))
        return converted.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, group_norm(child))
    return module


def has_batch_norm(module: nn.Module) -> bool:
    """Whether anything in the module normalises over samples."""
    return any(isinstance(m, _BatchNorm) for m in module.modules())
