"""The losses that ``run.py nt_xent`` compares, as functions of the raw embeddings z1 and z2 (B, D) of two views."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sslx.losses import nt_xent

Loss = Callable[[Tensor, Tensor], Tensor]


def dense(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """The common implementation: softmax cross-entropy over the N×N similarities."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    return F.cross_entropy(logits.float(), torch.arange(len(z), device=z.device).roll(len(z1)))


def arms(temperature: float, device: torch.device, compiled: bool) -> dict[str, Loss]:
    """sslx first, then the peers that are installed and run on this device."""
    losses: dict[str, Loss] = {
        "sslx": lambda z1, z2: nt_xent(z1, z2, temperature),
        "dense eager": lambda z1, z2: dense(z1, z2, temperature),
    }
    if compiled:
        fast = torch.compile(dense, dynamic=False)  # otherwise all batch sizes after the first get code for any size
        losses["dense torch.compile"] = lambda z1, z2: fast(z1, z2, temperature)
    makers = {"lightly NTXentLoss": _lightly, "pytorch-metric-learning SupConLoss": _metric_learning}
    if device.type == "cuda":
        makers |= {"memeff, two calls": _memeff_two_calls, "memeff's kernels, one call": _memeff_one_call}
        if compiled:
            makers["flex_attention, compiled"] = _flex_attention
    for name, make in makers.items():
        try:
            losses[name] = make(temperature)
        except ImportError as error:
            print(f"{name}: left out ({error}; pip install -e .[bench])")
        except Exception as error:  # a failing peer must not cost the others their figures
            print(f"{name}: left out ({type(error).__name__}: {str(error).partition(chr(10))[0]})")
    return losses


def _lightly(temperature: float) -> Loss:
    return import_module("lightly.loss").NTXentLoss(temperature=temperature)


def _metric_learning(temperature: float) -> Loss:
    loss = import_module("pytorch_metric_learning.losses").SupConLoss(temperature=temperature)

    def sup_con(z1: Tensor, z2: Tensor) -> Tensor:
        return loss(torch.cat([z1, z2]), torch.arange(len(z1), device=z1.device).repeat(2))

    return sup_con


def _memeff_two_calls(temperature: float) -> Loss:
    """memeff's InfoNCE with query-query negatives, from each view to the other: exactly NT-Xent."""
    loss = import_module("memeff").MemoryEfficientQwen3Loss(
        temperature=temperature, margin=1e9, use_qq_negatives=True, stable=False
    )
    return lambda z1, z2: (loss(z1, z2) + loss(z2, z1)) / 2


def _memeff_one_call(temperature: float) -> Loss:
    """memeff's kernels on both views at once, which its interface does not offer: its fastest form."""
    common = import_module("memeff._common")
    scale = common.LOG2E / temperature

    class OneCall(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            partner = z.roll(len(z) // 2, 0)
            positive = (z.float() * partner.float()).sum(dim=1)
            total = torch.zeros(len(z), device=z.device)
            common.launch_qwen3_denom(z, z, positive, total, scale, 1e9, exclude_diag=True)
            ctx.save_for_backward(z, positive, total)
            return (total.log() + (1 - positive) / temperature).mean()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            z, positive, total = ctx.saved_tensors
            share = 1 / (temperature * len(z))
            d = -2 * share * z.roll(len(z) // 2, 0).float()
            options = {"row_side": True, "col_side": True, "exclude_diag": True}
            common.launch_qwen3_fa_grad(z, z, positive, total, d, scale, 1e9, share, **options)
            return (d * gradients[0]).to(z.dtype)

    def one_call(z1: Tensor, z2: Tensor) -> Tensor:
        z = torch.cat([z1, z2])
        return OneCall.apply(F.normalize(z.float(), dim=1).to(z.dtype))

    return one_call


def _flex_attention(temperature: float) -> Loss:
    """FlexAttention's log-sum-exp, over values of zero, with a row's own column masked."""
    flex = import_module("torch.nn.attention.flex_attention")
    auxiliary = flex.AuxRequest(lse=True)

    def others(score: Tensor, _batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i == j, -torch.inf, score)

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        z = torch.cat([z1, z2])
        z = F.normalize(z.float(), dim=1).to(z.dtype)
        values = z.new_zeros(1, 1, len(z), 16)
        rows = z[None, None]
        _, auxiliary_outputs = flex.flex_attention(
            rows, rows, values, score_mod=others, scale=1 / temperature, return_aux=auxiliary
        )
        positive = (z.float() * z.roll(len(z1), 0).float()).sum(dim=1)
        return (auxiliary_outputs.lse[0, 0].float() - positive / temperature).mean()

    return torch.compile(loss, dynamic=False)
