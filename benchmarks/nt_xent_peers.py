"""The peers that ``bench_nt_xent.py`` times: each a function of two views' raw embeddings z1, z2, (B, D) each."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sslx.losses import nt_xent

Loss = Callable[[Tensor, Tensor], Tensor]


def dense(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """What people write: softmax cross-entropy over the N×N similarities."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    return F.cross_entropy(logits.float(), torch.arange(len(z), device=z.device).roll(len(z1)))


def arms(temperature: float, device: torch.device, compiled: bool) -> dict[str, Loss]:
    """Ours first, then the peers that are installed and run on this device."""
    found: dict[str, Loss] = {
        "sslx": lambda z1, z2: nt_xent(z1, z2, temperature),
        "dense eager": lambda z1, z2: dense(z1, z2, temperature),
    }
    if compiled:
        fast = torch.compile(dense, dynamic=False)  # else the second size is compiled for all sizes
        found["dense torch.compile"] = lambda z1, z2: fast(z1, z2, temperature)
    makers = {"lightly NTXentLoss": _lightly, "pytorch-metric-learning SupConLoss": _metric_learning}
    if device.type == "cuda":
        makers |= {"memeff, two calls": _memeff_two_calls, "memeff's kernels, one call": _memeff_one_call}
        if compiled:
            makers["flex_attention, compiled"] = _flex_attention
    for name, make in makers.items():
        try:
            found[name] = make(temperature)
        except ImportError as error:
            print(f"{name}: left out ({error}; pip install -e .[bench])")
        except Exception as error:  # a peer that cannot even be made must not end the others' comparison
            print(f"{name}: left out ({type(error).__name__}: {str(error).splitlines()[:1]})")
    return found


def _lightly(temperature: float) -> Loss:
    return import_module("lightly.loss").NTXentLoss(temperature=temperature)


def _metric_learning(temperature: float) -> Loss:
    loss = import_module("pytorch_metric_learning.losses").SupConLoss(temperature=temperature)

    def sup_con(z1: Tensor, z2: Tensor) -> Tensor:
        return loss(torch.cat([z1, z2]), torch.arange(len(z1), device=z1.device).repeat(2))

    return sup_con


def _memeff_two_calls(temperature: float) -> Loss:
    """Its InfoNCE with query-query negatives, from each view to the other: NT-Xent exactly."""
    loss = import_module("memeff").MemoryEfficientQwen3Loss(
        temperature=temperature, margin=1e9, use_qq_negatives=True, stable=False
    )
    return lambda z1, z2: (loss(z1, z2) + loss(z2, z1)) / 2


def _memeff_one_call(temperature: float) -> Loss:
    """Its kernels on both views at once, a way in that it does not offer: the strongest form of it."""
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
    """Its log of the sum of exponents, over values of zero, with a row's own column masked."""
    flex = import_module("torch.nn.attention.flex_attention")
    auxiliary = flex.AuxRequest(lse=True)

    def others(score: Tensor, _batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i == j, -torch.inf, score)

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        z = torch.cat([z1, z2])
        z = F.normalize(z.float(), dim=1).to(z.dtype)
        values = z.new_zeros(1, 1, len(z), 16)
        rows = z[None, None]
        _, found = flex.flex_attention(
            rows, rows, values, score_mod=others, scale=1 / temperature, return_aux=auxiliary
        )
        positive = (z.float() * z.roll(len(z1), 0).float()).sum(dim=1)
        return (found.lse[0, 0].float() - positive / temperature).mean()

    return torch.compile(loss)
