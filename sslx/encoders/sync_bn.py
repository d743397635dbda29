"""Batch norm over the samples of all ranks, on any device, including the CPU with gloo.

Ranks communicate through two opaque operators on small tensors, without waiting for the device: the forward gathers
each rank's mean, variance and count, and the backward sums the gradients of mean and variance.  Around these operators,
compiled code is plain arithmetic that the compiler can fuse; eager code uses the kernels of plain batch norm.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from sslx.distributed import Group, all_gather, group_named, name_of, sum_over_ranks, world_size


def _merge_moments(mean: Tensor, var: Tensor, count: int, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean (C,), biased variance (C,) and number of samples () over all ranks; one gather of 2C + 1 numbers.

    mean, var, count: the same of this rank's samples.
    """
    # Merging (mean, variance, count) does not cancel as sums of squares do (Chan, Golub & LeVeque 1983).
    gathered = all_gather(torch.cat([mean, var, mean.new_full((1,), count)])[None], group)
    means, variances, counts = gathered.split([len(mean), len(mean), 1], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    return mean, (counts * (variances + (means - mean).square())).sum(0) / total, total


@torch.library.custom_op("sslx::merge_moments", mutates_args=())
def _merge_op(mean: Tensor, var: Tensor, count: int, group_name: str) -> tuple[Tensor, Tensor, Tensor]:
    return _merge_moments(mean, var, count, group_named(group_name))


@_merge_op.register_fake
def _(mean: Tensor, var: Tensor, count: int, group_name: str) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(mean), torch.empty_like(var), mean.new_empty(())


@torch.library.custom_op("sslx::merge_moments_backward", mutates_args=())
def _merge_backward_op(
    grad_mean: Tensor, grad_var: Tensor, own_mean: Tensor, mean: Tensor, share: Tensor, group_name: str
) -> tuple[Tensor, Tensor]:
    """Return the gradients (C,) of this rank's mean and variance; one sum of 2C numbers over ranks.

    share: this rank's share of all samples, ().
    Every rank's loss depends on the merged moments, so the ranks' gradients with respect to them add up.
    """
    grad_mean, grad_var = sum_over_ranks(torch.stack([grad_mean, grad_var]), group_named(group_name)).mul_(share)
    return torch.addcmul(grad_mean, own_mean - mean, grad_var, value=2), grad_var.clone()


@_merge_backward_op.register_fake
def _(
    grad_mean: Tensor,  # noqa: ARG001
    grad_var: Tensor,  # noqa: ARG001
    own_mean: Tensor,
    mean: Tensor,
    share: Tensor,  # noqa: ARG001
    group_name: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(own_mean), torch.empty_like(mean)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    own_mean, _, count, ctx.group_name = inputs
    mean, _, total = output
    ctx.mark_non_differentiable(total)
    ctx.save_for_backward(own_mean, mean, count / total)


def _backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_merge_backward_op(grad_mean, grad_var, *ctx.saved_tensors, ctx.group_name), None, None


_merge_op.register_autograd(_backward, setup_context=_setup_context)


def _per_channel(values: Tensor, ndim: int) -> Tensor:
    """Reshape (C,) to (1, C, 1, ...), which broadcasts against (N, C, ...)."""
    return values.view([1, -1, *[1] * (ndim - 2)])


def _compilable_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group_name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute what ``_EagerBatchNorm`` computes as elementwise code and reductions around the two opaque operators.

    The compiler fuses this code with what comes before and after it and differentiates it, without a graph break.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(wide, [0, *range(2, x.ndim)], correction=0)
    mean, var, total = _merge_op(mean, var, wide.numel() // wide.shape[1], group_name)
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    output = (wide - _per_channel(mean, x.ndim)) * _per_channel(scale, x.ndim)
    if bias is not None:
        output = output + _per_channel(bias, x.ndim)
    return output.to(x.dtype), mean.detach(), var.detach(), total


class _EagerBatchNorm(torch.autograd.Function):
    """Batch norm over the samples of all ranks by the kernels of plain batch norm, each of which reads x once.

    Returns (output, mean, biased variance, global count).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Group
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var, total = _merge_moments(*_own_moments(wide), wide.numel() // wide.shape[1], group)
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
        # Called with the global mean and 1/std, torch's operator returns this rank's sums of dy * xhat and of dy.
        wide, grad = x.to(mean.dtype), grads[0].to(mean.dtype)
        statistics = (None, None, mean, inverse_std, True, ctx.eps, [False, True, True])
        _, own_dot, own_sum = torch.ops.aten.native_batch_norm_backward(grad, wide, None, *statistics)
        grad_x = None
        if ctx.needs_input_grad[0]:
            mean_dy, mean_dot = sum_over_ranks(torch.stack([own_sum, own_dot]), ctx.group) / total
            scale = inverse_std if weight is None else inverse_std * weight
            slope = scale * inverse_std * mean_dot
            center, slope, scale, offset = (_per_channel(c, x.ndim) for c in (mean, -slope, scale, scale * mean_dy))
            grad_x = (wide - center).mul_(slope).addcmul_(grad, scale).sub_(offset).to(x.dtype)
        grad_weight = None if weight is None else own_dot.to(weight.dtype)
        grad_bias = None if bias is None else own_sum.to(bias.dtype)
        return grad_x, grad_weight, grad_bias, None, None


def _own_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and biased variance (C,) of this rank's samples (N, C, ...), which are fp32 or fp64."""
    if x.device.type == "cpu":
        return torch.batch_norm_update_stats(x, None, None, 0.0)  # faster on a CPU, above all in channels_last
    var, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
    return mean, var


class SyncBatchNorm(_BatchNorm):
    """``nn.BatchNorm`` over the samples of all ranks, on any device, for (N, C), (N, C, L), (N, C, H, W), ...

    Statistics have at least fp32 precision, ranks with different N are weighted by N, and running statistics use the
    global count.  Gradients of weight and bias are this rank's terms of a sum over ranks.  With the gradient convention
    of the losses, the mean that DDP computes is therefore the full-batch gradient.  In evaluation mode and on a single
    rank this is ``F.batch_norm``.  ``drop`` and ``act`` are those of timm's BatchNormAct2d.
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
        self.group, self._group_name = group, name_of(group)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the input (N, C, ...); the output has the same shape, dtype and memory format."""
        synced = self.training and world_size(self.group) > 1
        output = self._normalize_over_ranks(input) if synced else super().forward(input)
        return self.act(self.drop(output))

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected input of shape (N, C, ...), got {tuple(input.shape)}")

    def _normalize_over_ranks(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        arguments = input, self.weight, self.bias, self.eps
        if torch.compiler.is_compiling():  # the graph splitter of DDP does not support autograd.Function
            output, mean, var, count = _compilable_batch_norm(*arguments, self._group_name)
        else:
            output, mean, var, count = cast("tuple[Tensor, ...]", _EagerBatchNorm.apply(*arguments, self.group))
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
    """Replace every nn.BatchNorm*d and timm BatchNormAct2d in the module (or the module itself) by a SyncBatchNorm.

    Parameters, buffers and state-dict keys stay the same.
    """
    if isinstance(module, _BatchNorm):
        return module if isinstance(module, SyncBatchNorm) else _convert(module, group)
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
