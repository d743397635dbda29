"""State dicts load whole or not at all, through the wrappers of DDP and torch.compile."""

from typing import cast

import pytest
import torch
from torch import nn

from sslx.encoders import state_dicts
from sslx.errors import DataError


class Net(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, width)
        self.head = nn.Linear(width, 1)


def test_weights_load_through_wrappers() -> None:
    state = Net().state_dict()
    compiled = cast(nn.Module, torch.compile(Net()))
    for old, new in (("", ""), ("", "module."), ("", "_orig_mod.module."), ("encoder.", "encoder._orig_mod.")):
        renamed = {key.replace(old, new, 1): value for key, value in state.items()}
        for target in (Net(), compiled, nn.DataParallel(Net())):
            state_dicts.load(target, renamed, "weights")
            for mine, theirs in zip(target.state_dict().values(), state.values(), strict=True):
                assert torch.equal(mine, theirs)
            nn.init.zeros_(next(target.parameters()))


def test_weights_that_do_not_fit() -> None:
    renamed = Net(4).state_dict()
    del renamed["head.bias"]
    renamed |= {f"extra.{i}": torch.zeros(1) for i in range(5)}
    target = Net(3)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(DataError) as caught:
        state_dicts.load(target, renamed, "runs/x/step_5", expected="resnet18", got="resnet50")
    assert str(caught.value) == (
        "runs/x/step_5 does not fit: expected resnet18, got resnet50; of 4 keys 1 missing (head.bias), "
        "5 unexpected (extra.0, extra.1, extra.2, ...), "
        "3 of another shape (encoder.weight (3, 2), not (4, 2), encoder.bias (3,), not (4,), "
        "head.weight (1, 3), not (1, 4)): "
        "build the model as in the run's config.json, or use other weights"
    )
    torch.testing.assert_close(target.state_dict(), before, rtol=0, atol=0)
