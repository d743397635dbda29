"""What every loss of two views refuses in one line, and on all ranks alike."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kit import full_batch, tiny
from sslx import losses
from sslx.errors import ConfigError
from sslx.methods.base import Embedded


def swav(z1: Tensor, z2: Tensor) -> Tensor:
    return tiny.narrowed("swav", "resnet").loss(Embedded((z1, z2), (z1, z2))).loss


LOSSES: dict[str, Callable[..., Any]] = {
    "NT-Xent": losses.nt_xent,
    "InfoNCE": losses.info_nce,
    "Barlow Twins": losses.barlow_twins,
    "VICReg": losses.vicreg,
    "the margin loss": losses.pair_distances,
    "SwAV": swav,
}


@pytest.mark.parametrize("name", LOSSES)
def test_unequal_batches_are_an_error_on_all_ranks(name: str, ranks: full_batch.RunOnRanks):
    full_batch.refuses_unequal_batches(ranks, LOSSES[name], name)


@pytest.mark.parametrize("name", list(LOSSES)[:4])
def test_one_sample_views_of_unequal_shape_and_integers_are_refused(name: str):
    loss = LOSSES[name]
    with pytest.raises(ConfigError, match=rf"^{name} .*: expected 2 samples or more, got 1$"):
        loss(torch.ones(1, 4), torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"\(4, 3\), \(4, 2\)$"):
        loss(torch.ones(4, 3), torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"floats, got torch\.int64"):
        loss(torch.ones(4, 3, dtype=torch.int64), torch.ones(4, 3))


def test_info_nce_needs_a_temperature():
    with pytest.raises(ValueError, match="above 0, got 0"):
        losses.info_nce(torch.ones(4, 3), torch.ones(4, 3), 0)


@pytest.mark.parametrize(
    ("loss", "mean", "dtype"),
    [
        (partial(losses.barlow_twins, off_diagonal_weight=0.3), 1000, torch.float32),
        (
            partial(losses.vicreg, invariance_weight=2.0, variance_weight=9.0, covariance_weight=0.7),
            1000,
            torch.float32,
        ),
        (partial(losses.info_nce, temperature=0.01), 0, torch.bfloat16),
    ],
)
def test_it_is_in_fp32_in_autocast_too(loss: Any, mean: float, dtype: torch.dtype, generator: torch.Generator):
    """A mean of 1000 leaves sums of squares no digits, and bf16 none of the deviation, nor at a low temperature."""
    x, noise = torch.randn(2, 64, 6, generator=generator)
    z1, z2 = ((mean + z).to(dtype) for z in (x, x + noise / 2))
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = loss(z1, z2)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(loss(z1.double(), z2.double())[0].item(), rel=1e-4)
