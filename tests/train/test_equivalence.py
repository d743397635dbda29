"""W ranks train as one does with the same global batch: the real loader, DDP, sync BN and NT-Xent together."""

import pytest
import torch
from torch import Tensor

from kit.full_batch import RunOnRanks
from sslx import distributed
from sslx.config import load
from sslx.distributed import Ranks
from sslx.train.build import build
from sslx.train.step import train_step

SETTINGS = (
    "--source.name synthetic --source.num-samples 96 --data.size 16 --data.threads 1 --encoder.layers 1 1 1 1 "
    "--encoder.channels 8 8 16 16 --method.hidden-dim 16 --method.projection-dim 16 --batch-size 48 "
    "--method.temperature 0.5 --augment.min-scale 0.3 --optim.weight-decay 1e-4 --optim.lr 0.01 "
    "--batch-norm sync --device cpu --compile off"
).split()


def train(flags: list[str], steps: int) -> tuple[list[float], list[Tensor], Tensor]:
    """Loss and gradient of each step, and the batch norm statistics at the end; the same on every rank."""
    torch.set_num_threads(1)
    # oneDNN picks another algorithm for another batch size, whose rounding can push a ReLU over its kink.
    torch._C._set_mkldnn_enabled(False)
    ranks = Ranks(device=torch.device("cpu"), rank=distributed.rank(), world_size=distributed.world_size())
    parts = build(load([*SETTINGS, *flags]), ranks, lambda _: None)
    losses, gradients = list[float](), list[Tensor]()
    for _ in range(steps):
        metrics = train_step(parts.model, [next(parts.loader)], parts.optimizer, 0.0, None)
        losses.append(float(distributed.mean_over_ranks(metrics["loss"].double())))
        of_parameters = [p.grad for p in parts.method.parameters() if p.grad is not None]
        gradients.append(torch.cat([gradient.double().flatten() for gradient in of_parameters]))
    statistics = [b.double().flatten() for n, b in parts.method.named_buffers() if "running" in n]
    return losses, gradients, torch.cat(statistics)


def worst(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference of an entry, relative to the largest entry of its step."""
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("world_size", "optimizer", "num_steps"),
    [
        (2, "sgd", 5),
        pytest.param(2, "sgd", 20, marks=pytest.mark.slow),
        pytest.param(2, "lars", 20, marks=pytest.mark.slow),
        pytest.param(3, "sgd", 20, marks=pytest.mark.slow),
    ],
)
def test_equal_in_fp64_for_many_steps(ranks: RunOnRanks, world_size: int, optimizer: str, num_steps: int) -> None:
    flags = ["--optim.name", optimizer, "--data.backend", "dali", "--precision", "fp64"]
    one = ranks(1, train, flags, num_steps)[0]
    for found in ranks(world_size, train, flags, num_steps):
        assert max(abs(a - b) for a, b in zip(found[0], one[0], strict=True)) < 1e-10
        assert worst(found[1], one[1]) < 1e-10
        torch.testing.assert_close(found[2], one[2], rtol=1e-10, atol=1e-10)
    assert one[0][0] != one[0][-1], "nothing was learned: the comparison shows nothing"


def test_equal_in_fp32_on_the_first_step(ranks: RunOnRanks) -> None:
    flags = "--optim.name sgd --data.backend torchvision --data.threads 0 --precision fp32".split()
    one, two = (ranks(world_size, train, flags, 1)[0] for world_size in (1, 2))
    assert abs(two[0][0] - one[0][0]) < 1e-5
    assert worst(two[1], one[1]) < 1e-5


@pytest.mark.soak
def test_local_batch_norm_is_not_equivalent(ranks: RunOnRanks) -> None:
    """The gate can fail: without sync BN, two ranks do not train as one does."""
    flags = "--optim.name sgd --precision fp64 --batch-norm local".split()
    one, two = (ranks(world_size, train, flags, 2)[0] for world_size in (1, 2))
    assert worst(two[1], one[1]) > 1e-4
