"""What every method keeps to; the methods are found by their files."""

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kit import tiny
from kit.full_batch import RunOnRanks
from sslx import distributed, methods, optim, rng
from sslx.data.batch import Batch
from sslx.data.draws import Draws
from sslx.errors import ConfigError
from sslx.machine import onednn
from sslx.methods.base import Embedded, Method
from sslx.train.step import cached_step, train_step

NUM = 6
pytestmark = pytest.mark.parametrize("name", [f"{name} {encoder}" for name, encoder in tiny.CASES])
"""Of the method and its encoder, as "mae vit"."""


def make(name: str, seed: int = 0) -> tuple[Any, torch.optim.Optimizer]:
    method = tiny.narrowed(*name.split(), seed=seed)
    return method, optim.build(optim.Config(name="sgd", lr=0.03), method)


def batch(name: str, generator: torch.Generator) -> Batch:
    return tiny.batch(make(name)[0], generator, NUM)


def steps(method: Method, optimizer: Any, images: Batch, num: int, first: int = 0) -> Tensor:
    """The loss of each step, as the loop takes them: (num,)."""
    progress = [(step + 0.5) / 100 for step in range(first, first + num)]
    return torch.stack([train_step(method, [images], optimizer, share, None)["loss"] for share in progress])


def test_its_config_names_it_and_its_views_are_of_the_asked_size(name: str):
    config = methods.module(name.split()[0]).Config()
    assert config.name == name.split()[0]
    assert max(spec.size for spec in tiny.specs(config)) == tiny.SIZE
    assert all(spec.augment is not None for spec in tiny.specs(config))


def test_widths_below_one_are_refused(name: str):
    kind = methods.module(name.split()[0]).Config
    widths = [field.name for field in dataclasses.fields(kind) if field.name.endswith("_dim")]
    tiny.refuses(kind, **dict.fromkeys(widths, (0, -1)))


def test_a_batch_of_one_is_refused_in_one_line(name: str):
    with pytest.raises(ConfigError, match=r"^[^\n]*got a batch of 1$"):
        make(name)[0].config.check(1, tiny.LABELED)


def test_a_step_gives_a_scalar_and_metrics_and_every_parameter_a_gradient(name: str, generator: torch.Generator):
    method, _ = make(name)
    step = method(batch(name, generator))
    assert step.loss.shape == ()
    assert step.loss.isfinite()
    assert step.metrics, "say what tells the user that it works"
    for key, value in step.metrics.items():
        assert (value.shape, value.dtype, value.requires_grad) == ((), torch.float32, False), key
        assert value.isfinite(), key
    step.loss.backward()
    unused = [key for key, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused, "DDP would wait for them"
    assert sum(p.grad.abs().sum() for p in method.encoder.parameters() if p.grad is not None) > 0


def test_it_learns_a_fixed_batch(name: str):
    method, optimizer = make(name)
    # VICReg's loss is 25 times another's (its weights are 25, 25 and 1): at one lr for all, what it does after 40 steps
    # is a matter of the last bits.
    for group in optimizer.param_groups:
        group["lr"] = 0.003 if name.startswith("vicreg") else 0.03
    losses = steps(method, optimizer, tiny.batch(method, torch.Generator().manual_seed(5), 8), 40)
    assert losses.isfinite().all()
    assert losses[-5:].mean() < losses[:2].mean() - 0.1 * (losses[:2].mean() - losses.min())
    assert losses[-5:].mean() < losses[0]


def test_the_same_seed_gives_the_same_numbers(name: str):
    images = batch(name, torch.Generator().manual_seed(5))
    first, again, other = (steps(*make(name, seed), images, 3) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_its_state_is_all_that_a_restart_needs(name: str, generator: torch.Generator):
    images = batch(name, generator)
    method, optimizer = make(name)
    steps(method, optimizer, images, 2)
    restarted, its_optimizer = make(name, seed=1)
    restarted.load_state_dict(method.state_dict())
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it would share the momentum
    on, again = steps(method, optimizer, images, 3, first=2), steps(restarted, its_optimizer, images, 3, first=2)
    assert torch.equal(on, again)
    assert "progress" not in method.state_dict()
    for key, value in method.state_dict().items():
        assert torch.equal(value, restarted.state_dict()[key]), key


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_bf16_autocast_keeps_the_loss_in_fp32_and_finite(name: str, generator: torch.Generator):
    method, _ = make(name)
    images = batch(name, generator)
    onednn.apply_workarounds(method)
    with torch.autocast("cpu", torch.bfloat16):
        step = method(images)
    assert step.loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in step.metrics.values())
    step.loss.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
    full = make(name)[0](images).loss
    assert step.loss.item() == pytest.approx(full.item(), rel=0.2, abs=0.05)


def test_a_step_never_waits_for_the_device(name: str, generator: torch.Generator, no_host_sync: TorchDispatchMode):
    method, optimizer = make(name)
    images = batch(name, generator)
    train_step(method, [images], optimizer, 0.0, None)  # makes the optimizer's state
    with no_host_sync:
        train_step(method, [images], optimizer, 0.0, None)


def test_a_step_that_is_not_finite_leaves_no_trace(name: str, generator: torch.Generator):
    """Not in weights, running statistics, center, queue, moving average or optimizer, as the first step or later."""
    (method, optimizer), (never, other) = make(name), make(name)

    def taken(method: Method, optimizer: Any, images: Batch) -> bool:
        rng.seed_torch(1)
        return bool(train_step(method, [images], optimizer, 0.3, None)["taken"])

    good, bad = batch(name, generator), batch(name, generator)
    bad.views[0][3] = torch.inf
    for _ in range(2):
        assert not taken(method, optimizer, bad)
        assert taken(method, optimizer, good)
        assert taken(never, other, good)
        for mine, theirs in ((method, never), (optimizer, other)):
            torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def test_norms_see_all_views_of_a_size_together(name: str, generator: torch.Generator):
    """Not view by view (stable-pretraining #432), in heads and moving averages too."""
    method, _ = make(name)
    seen: list[int] = []
    for part in method.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
            part.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    method(batch(name, generator))
    fewest = min(Counter(spec.size for spec in tiny.specs(method.config)).values())
    assert min(seen, default=fewest * NUM) >= fewest * NUM


def test_views_of_a_size_go_through_the_encoder_at_once(name: str, generator: torch.Generator):
    method, _ = make(name)
    forwards: list[int] = []
    method.encoder.register_forward_hook(lambda *_: forwards.append(1))
    method(batch(name, generator))
    assert len(forwards) <= len({spec.size for spec in tiny.specs(method.config)})


def test_what_is_given_has_no_gradient_and_what_is_compared_has(name: str, generator: torch.Generator):
    embedded = make(name)[0].embed(batch(name, generator))
    assert all(z.requires_grad and z.is_floating_point() and len(z) == NUM for z in embedded.compared)
    assert not any(z.requires_grad or len(z) != NUM for z in embedded.given)


def test_draws_are_those_of_the_samples_alone(name: str):
    """Of parts of a batch they are the parts, and of other epochs and seeds they are others."""
    method, _ = make(name)

    def draw(rows: slice, seed: int = 7, epoch: int = 3) -> tuple[np.ndarray, ...]:
        return method.draw(Draws(seed=seed, epoch=epoch, batch=4, index=np.arange(100)[rows]))

    whole = draw(slice(100))
    for arrays, same in ((draw(slice(40, 60)), True), (draw(slice(40, 60), seed=8), False)):
        assert all(np.array_equal(a, b[40:60]) == same for a, b in zip(arrays, whole, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(draw(slice(100), epoch=4), whole, strict=True))


def gradients_by_loss(
    name: str, state: dict[str, Tensor], embedded: Embedded, scales: list[Tensor], planted: bool
) -> tuple[float, list[Tensor]]:
    """The means over ranks of the loss of this rank's rows, and of the gradients of a factor of what is compared."""
    world_size, rank = distributed.world_size(), distributed.rank()
    method = tiny.at(make(name)[0].double(), 0.5)
    method.load_state_dict(state)
    leaves = [scale.clone().requires_grad_() for scale in scales]
    compared, given = (tuple(z.chunk(world_size)[rank] for z in tensors) for tensors in embedded)
    loss = method.loss(Embedded(tuple(z * s for z, s in zip(compared, leaves, strict=True)), given)).loss
    found = [g / world_size if planted else g for g in torch.autograd.grad(loss, leaves)]
    return distributed.mean_over_ranks(loss.detach()).item(), [distributed.mean_over_ranks(g) for g in found]


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_give_the_loss_and_the_gradients_of_the_whole_batch(
    name: str, world_size: int, ranks: RunOnRanks, generator: torch.Generator
):
    method = make(name)[0].double()
    with torch.no_grad():
        embedded = method.embed(tiny.batch(method, generator, NUM))
    scales = [0.5 + torch.rand(z.shape[1:], generator=generator, dtype=z.dtype) for z in embedded.compared]
    truth, expected = gradients_by_loss(name, method.state_dict(), embedded, scales, planted=False)
    for planted in (False, True):
        for loss, found in ranks(world_size, gradients_by_loss, name, method.state_dict(), embedded, scales, planted):
            assert loss == pytest.approx(truth, rel=1e-9)
            error = sum(float((a - b).norm()) for a, b in zip(found, expected, strict=True))
            assert (error > 1e-3 * sum(float(b.norm()) for b in expected)) == planted


def test_a_compiled_embed_is_used_and_can_be_left_out(
    name: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
):
    (method, optimizer), images, calls = make(name), [batch(name, generator)], list[int]()

    def compiled(embed: Callable[[Batch], Embedded]) -> Callable[[Batch], Embedded]:
        return lambda images: (calls.append(1), embed(images))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    method.compile_embed()
    for step, num_calls in ((train_step, 1), (cached_step, 1 + 2)):
        step(method, images, optimizer, 0.5, None)
        assert len(calls) == num_calls
        with method.eager():
            step(method, images, optimizer, 0.5, None)
        assert len(calls) == num_calls
