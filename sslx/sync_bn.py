"""Batch norm over the samples of all ranks, on any device, gloo and CPU too."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from sslx.distributed import Group, all_gather, sum_over_ranks, world_size


class _SyncBatchNorm(torch.autograd.Function):
    """Batch norm over the samples of all ranks.  Returns (output, mean, biased variance, global count)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Group
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var = torch.batch_norm_update_stats(wide, None, None, 0.0)
        count = mean.new_full((1,), wide.numel() / wide.shape[1])
        # Chan, Golub & LeVeque 1983: merging (mean, variance, count) does not cancel as sums of squares do.
        every = all_gather(torch.cat([mean, var, count])[None], group)
        means, variances, counts = every.split([len(mean), len(mean), 1], dim=1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        var = (counts * (variances + (means - mean).square())).sum(0) / total
        affine = [None if p is None else p.to(mean.dtype) for p in (weight, bias)]
        output = F.batch_norm(x, mean, var, *affine, training=False, eps=eps)
        ctx.save_for_backward(x, weight, bias, mean, torch.rsqrt(var + eps), total)
        ctx.group, ctx.eps = group, eps
        ctx.mark_non_differentiable(mean, var, total)
        return output, mean, var, total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse_std, total = ctx.saved_tensors
        # Given the global mean and 1/std, its last two results are this rank's sums of dy * xhat and of dy.
        wide, grad = x.to(mean.dtype), grads[0].to(mean.dtype)
        statistics = (None, None, mean, inverse_std, True, ctx.eps, [False, True, True])
        _, own_dot, own_sum = torch.ops.aten.native_batch_norm_backward(grad, wide, None, *statistics)
        grad_x = None
        if ctx.needs_input_grad[0]:
            mean_dy, mean_dot = sum_over_ranks(torch.stack([own_sum, own_dot]), ctx.group) / total
            scale = inverse_std if weight is None else inverse_std * weight
            slope = scale * inverse_std * mean_dot
            shape = [1, -1, *[1] * (x.ndim - 2)]
            grad_x = (wide - mean.view(shape)).mul_(-slope.view(shape)).addcmul_(grad, scale.view(shape))
            grad_x = grad_x.sub_((scale * mean_dy).view(shape)).to(x.dtype)
        grad_weight = None if weight is None else own_dot.to(weight.dtype)
        grad_bias = None if bias is None else own_sum.to(bias.dtype)
        return grad_x, grad_weight, grad_bias, None, None


class SyncBatchNorm(_BatchNorm):
    """``nn.BatchNorm`` over the samples of all ranks, on any device: (N, C), (N, C, L), (N, C, H, W), ...

    Statistics are in fp32 at least, unequal N are weighed, running statistics use the global count.  Weight
    and bias gradients are this rank's share, whose sum over ranks is the full one: with losses as shares of
    a mean, DDP's mean is the full-batch gradient.  Outside training and on one rank: ``F.batch_norm``.
    ``drop`` and ``act`` are those of timm's BatchNormAct2d.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.group = group
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> the same shape, dtype and memory format."""
        synced = self.training and world_size(self.group) > 1
        output = self._over_ranks(input) if synced else super().forward(input)
        return self.act(self.drop(output))

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected input (N, C, ...), got shape {tuple(input.shape)}")

    @torch.compiler.disable()  # pyright: ignore[reportUntypedFunctionDecorator]
    def _over_ranks(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        output, mean, var, count = cast(
            "tuple[Tensor, ...]",
            _SyncBatchNorm.apply(input, self.weight, self.bias, self.eps, self.group),
        )
        if self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            share = 1 / self.num_batches_tracked.to(mean) if self.momentum is None else self.momentum
            with torch.no_grad():
                unbiased = var * (count / (count - 1))
                self.running_mean.copy_(self.running_mean * (1 - share) + mean * share)
                self.running_var.copy_(self.running_var * (1 - share) + unbiased * share)
        return output


def sync_batch_norm(module: nn.Module, group: Group = None) -> nn.Module:
    """Replace every nn.BatchNorm*d and timm BatchNormAct2d in the module (or itself) by a synchronised one.

    Parameters, buffers and state-dict keys stay.  On a GPU torch's own takes over, whose kernels are faster
    but know no CPU: move the module to its device first.
    """
    if isinstance(module, _BatchNorm):
        if isinstance(module, SyncBatchNorm | nn.SyncBatchNorm):
            return module
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if tensors and tensors[0].is_cuda:
            from timm.layers.norm_act import convert_sync_batchnorm

            return convert_sync_batchnorm(module, group)
        return _convert(module, group)
    for name, child in module.named_children():
        setattr(module, name, sync_batch_norm(child, group))
    return module


def _convert(module: _BatchNorm, group: Group) -> SyncBatchNorm:
    options = (module.eps, module.momentum, module.affine, module.track_running_stats)
    converted = SyncBatchNorm(module.num_features, *options, group)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(converted, name, getattr(module, name))
    converted.drop, converted.act = (getattr(module, name, nn.Identity()) for name in ("drop", "act"))
    return converted.train(module.training)
