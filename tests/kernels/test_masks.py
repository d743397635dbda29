"""The Triton kernels mask only the tiles that need it, and give what they give with a mask on every tile.

In Triton's interpreter, so in the process that ``test_the_triton_kernels_in_tritons_interpreter`` starts.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from kit.nt_xent import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="looks into Triton's interpreter")
if INTERPRETED:
    from sslx_kernels.nt_xent import fused, triton_kernels
    from sslx_kernels.nt_xent.rows import Block


def everything(num: int, positives: str, temperature: float, generator: torch.Generator) -> list[Tensor]:
    """Sums, loss and gradients of rows over themselves and over other columns."""
    z, other = (torch.randn(n, 24, generator=generator).bfloat16() for n in (num, num // 2 + 37))
    rows, columns, free = fused.prepare(z), fused.prepare(other), temperature > 0.014
    t, one, own = torch.tensor(temperature), torch.ones(()), torch.arange(num)
    mate = torch.empty_like(own)
    order = torch.randperm(num, generator=generator)
    mate[order], mate[order.roll(num // 2)] = order.roll(num // 2), order
    excluded = {"halves": None, "elsewhere": (own, mate)}.get(positives, (own - num, own % len(other)))
    of = columns if positives == "other columns" else None
    sums = [fused.sums(rows, of, excluded, t, free)]
    if of is None:
        sums.append(fused.sums(rows, columns, (), t, free))
    loss, denominators, negative_probs = fused.loss_from_sums(rows, of, excluded, sums, t, free)
    blocks = [Block(of, excluded)]
    if of is None:
        theirs = fused.sums(columns, rows, (), t, free)
        blocks.append(
            Block(columns, (), fused.loss_from_sums(columns, rows, (own[: len(other)],) * 2, [theirs], t, free)[1])
        )
    d, dy, _ = fused.gradient(rows, blocks, denominators, negative_probs, one, t, free, needs_columns=of is not None)
    return [loss, denominators, negative_probs, d, *([] if dy is None else [dy])]


@pytest.mark.parametrize(
    ("num", "positives", "temperature", "plain"),
    [
        (256, "halves", 0.1, False),
        (200, "halves", 0.1, False),
        (640, "halves", 0.1, True),
        (200, "elsewhere", 0.1, False),
        (256, "elsewhere", 0.01, True),
        (640, "elsewhere", 0.1, False),
        (200, "other columns", 0.1, True),
    ],
)
def test_fused_masks_where_they_matter_give_the_bits_of_masks_everywhere(
    monkeypatch: pytest.MonkeyPatch,
    generator: torch.Generator,
    num: int,
    positives: str,
    temperature: float,
    plain: bool,
) -> None:
    if plain:
        monkeypatch.setattr(fused, "_MAX_SYMMETRIC_ROWS", 0)
    state, masked = generator.get_state(), list[bool]()
    real = triton_kernels._needs_mask.fn

    def touches(*args: Any) -> Any:
        found = real(*args)
        masked.append(bool(found))
        return found

    found: list[list[Tensor]] = []
    for instead in (touches, lambda *_: True, lambda *_: False):
        monkeypatch.setattr(triton_kernels, "_needs_mask", instead)
        found.append(everything(num, positives, temperature, generator.set_state(state)))
    assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
    assert not torch.equal(found[0][3], found[2][3])  # without any mask the gradients are others
    assert 0 < sum(masked) < len(masked) or num == 200
