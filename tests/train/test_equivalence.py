"""W ranks train as one does with the same global batch: the real loader, DDP, sync BN and NT-Xent together."""

import pytest
import torch
from torch import Tensor

from sslx import data, distributed, encoders, optim, parallel, rng
from sslx.config import load
from sslx.data import sources
from sslx.distributed import Ranks
from sslx.encoders import sync_bn
from sslx.train.step import train_step

SETTINGS = [
    "--source.name", "synthetic", "--source.num-samples", "96", "--data.size", "16", "--data.threads", "1",
    "--encoder.layers", "1", "1", "1", "1", "--encoder.channels", "8", "8", "16", "16",
    "--method.hidden-dim", "16", "--method.projection-dim", "16", "--batch-size", "48", "--method.temperature", "0.5",
    "--augment.min-scale", "0.3", "--optim.weight-decay", "1e-4",
]  # fmt: skip


def train(
    flags: list[str], steps: int, dtype: torch.dtype, sync: bool = True
) -> tuple[list[float], list[Tensor], Tensor]:
    """Loss and gradient of each step, and the batch norm statistics at the end; the same on every rank."""
    torch.set_num_threads(1)
    # oneDNN picks another algorithm for another batch size, whose rounding can push a ReLU over its kink.
    torch._C._set_mkldnn_enabled(False)
    settings = load([*SETTINGS, *flags])
    rng.seed_torch(settings.seed)
    source = sources.build(settings.source, "pretrain")
    loader = data.training(
        settings.data,
        source,
        settings.method.inputs(settings.augment, 16).views,
        batch_size=settings.batch_size,
        seed=settings.seed,
        ranks=Ranks(device=torch.device("cpu"), rank=distributed.rank(), world_size=distributed.world_size()),
        dtype=dtype,
    )
    method = settings.method.build(encoders.build(settings.encoder, 16)).to(dtype)
    method = sync_bn.sync_batch_norm(method) if sync else method
    model = parallel.wrap(method, device=torch.device("cpu"))
    optimizer = optim.build(settings.optim, method)
    losses: list[float] = []
    gradients: list[Tensor] = []
    for _ in range(steps):
        metrics = train_step(model, [next(loader)], optimizer, 0.0, None)
        losses.append(float(distributed.mean_over_ranks(metrics["loss"].double())))
        gradients.append(torch.cat([p.grad.double().flatten() for p in method.parameters() if p.grad is not None]))
    statistics = [b.double().flatten() for n, b in method.named_buffers() if "running" in n]
    return losses, gradients, torch.cat(statistics)


def worst(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference of an entry, relative to the largest entry of its step."""
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("world_size", "optimizer"),
    [(2, "sgd"), pytest.param(2, "lars", marks=pytest.mark.slow), pytest.param(3, "sgd", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("backend", ["dali"])
def test_equal_in_fp64_for_20_steps(ranks, world_size: int, optimizer: str, backend: str) -> None:
    flags = ["--optim.name", optimizer, "--optim.lr", "0.01", "--data.backend", backend]
    one = ranks(1, train, flags, 20, torch.float64)[0]
    for found in ranks(world_size, train, flags, 20, torch.float64):
        assert max(abs(a - b) for a, b in zip(found[0], one[0], strict=True)) < 1e-10
        assert worst(found[1], one[1]) < 1e-10
        torch.testing.assert_close(found[2], one[2], rtol=1e-10, atol=1e-10)
    assert one[0][0] != one[0][-1], "nothing was learned: the comparison shows nothing"


def test_equal_in_fp32_on_the_first_step(ranks) -> None:
    flags = ["--optim.name", "sgd", "--optim.lr", "0.01", "--data.backend", "torchvision", "--data.threads", "0"]
    one = ranks(1, train, flags, 1, torch.float32)[0]
    two = ranks(2, train, flags, 1, torch.float32)[0]
    assert abs(two[0][0] - one[0][0]) < 1e-5
    assert worst(two[1], one[1]) < 1e-5


def test_local_batch_norm_is_not_equivalent(ranks) -> None:
    """The gate can fail: without sync BN, two ranks do not train as one does."""
    flags = ["--optim.name", "sgd", "--optim.lr", "0.01"]
    one = ranks(1, train, flags, 2, torch.float64, False)[0]
    two = ranks(2, train, flags, 2, torch.float64, False)[0]
    assert worst(two[1], one[1]) > 1e-4
