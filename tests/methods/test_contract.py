"""What every method keeps to; the methods are found by their files."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sslx import encoders, methods, optim, rng
from sslx.data.batch import Batch
from sslx.data.views import Augment, ViewSpec
from sslx.errors import ConfigError
from sslx.machine import onednn
from sslx.methods.base import Method
from sslx.train import finite
from sslx.train.step import train_step
from sslx.train.verify import narrow

SIZE, NUM = 16, 8
HERE = torch.device("cpu")
CASES = [(name, encoder) for name in methods.available() for encoder in methods.encoders(name)]
pytestmark = pytest.mark.parametrize("name", [f"{name} {encoder}" for name, encoder in CASES])
"""Of the method and its encoder, as "mae vit"."""
ENCODERS = {
    "resnet": encoders.Config(layers=(1, 1, 1, 1), channels=(8, 8, 8, 16)),
    "vit": encoders.Config(name="vit_tiny_patch16_224", patch=4, layers=(2,), channels=(16,)),
}


def module(name: str) -> Any:
    return methods.module(name.split()[0])


def views(name: str) -> tuple[ViewSpec, ...]:
    file = module(name)
    return file.views(narrow(file.Config()), Augment(), SIZE)


def make(name: str, seed: int = 0) -> tuple[Method, torch.optim.Optimizer]:
    rng.seed_torch(seed)
    file, trunk = module(name), ENCODERS[name.split()[1]]
    sizes = [spec.size for spec in views(name)]
    method: Method = file.Method(narrow(file.Config()), encoders.build(trunk, SIZE, *sizes))
    return method, optim.build(optim.Config(name="sgd", lr=0.03), method)


def batch(name: str, generator: torch.Generator) -> Batch:
    made = tuple(torch.randn(NUM, 3, spec.size, spec.size, generator=generator) for spec in views(name))
    draws = torch.rand(NUM, make(name)[0].num_draws, generator=generator)
    return Batch(made, torch.arange(NUM) // 2, torch.arange(NUM), draws)


def steps(method: Method, optimizer: Any, images: Batch, num: int, first: int = 0) -> list[Tensor]:
    """The loss of each step, as the loop takes them."""
    found: list[Tensor] = []
    for step in range(first, first + num):
        progress = torch.tensor((step + 0.5) / 100)
        found.append(train_step(method, [images], optimizer, progress, None)["loss"])
        method.after_step(progress)
    return found


def test_its_config_names_it_and_its_views_are_of_the_asked_size(name: str):
    assert module(name).Config().name == name.split()[0]
    assert max(spec.size for spec in views(name)) == SIZE
    assert all(spec.augment is not None for spec in views(name))


def test_a_step_gives_a_scalar_and_metrics_and_every_parameter_a_gradient(name: str, generator: torch.Generator):
    method, _ = make(name)
    step = method(batch(name, generator), torch.zeros(()))
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
    losses = torch.stack(steps(method, optimizer, batch(name, torch.Generator().manual_seed(5)), 40))
    assert losses.isfinite().all()
    assert losses[-5:].mean() < losses[:2].mean() - 0.1 * (losses[:2].mean() - losses.min())
    assert losses[-5:].mean() < losses[0]


def test_the_same_seed_gives_the_same_numbers(name: str):
    images = batch(name, torch.Generator().manual_seed(5))
    first, again, other = (torch.stack(steps(*make(name, seed), images, 3)) for seed in (0, 0, 1))
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
    assert torch.equal(torch.stack(on), torch.stack(again))
    for key, value in method.state_dict().items():
        assert torch.equal(value, restarted.state_dict()[key]), key


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_bf16_autocast_keeps_the_loss_in_fp32_and_finite(name: str, generator: torch.Generator):
    method, _ = make(name)
    images = batch(name, generator)
    onednn.apply_workarounds(method)
    with torch.autocast("cpu", torch.bfloat16):
        step = method(images, torch.zeros(()))
    assert step.loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in step.metrics.values())
    step.loss.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
    full = make(name)[0](images, torch.zeros(())).loss
    assert step.loss.item() == pytest.approx(full.item(), rel=0.2, abs=0.05)


def test_a_step_never_waits_for_the_device(name: str, generator: torch.Generator, no_host_sync: TorchDispatchMode):
    method, optimizer = make(name)
    images, progress = batch(name, generator), torch.zeros(())
    train_step(method, [images], optimizer, progress, None)  # makes the optimizer's state
    with no_host_sync:
        train_step(method, [images], optimizer, progress, None)
        method.after_step(progress)


def test_a_step_that_is_not_finite_leaves_no_trace(name: str, generator: torch.Generator):
    """Not in weights, running statistics, center, queue, moving average or optimizer, as the first step or later."""
    (method, optimizer), (never, other) = make(name), make(name)
    progress = torch.tensor(0.3)

    def taken(method: Method, optimizer: Any, images: Batch) -> bool:
        rng.seed_torch(1)
        found = train_step(method, [images], optimizer, progress, None)["taken"]
        method.after_step(finite.standing(progress, found))
        return bool(found)

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
    method(batch(name, generator), torch.zeros(()))
    fewest = min(Counter(spec.size for spec in views(name)).values())
    assert min(seen, default=fewest * NUM) >= fewest * NUM


def test_views_of_a_size_go_through_the_encoder_at_once(name: str, generator: torch.Generator):
    method, _ = make(name)
    forwards: list[int] = []
    method.encoder.register_forward_hook(lambda *_: forwards.append(1))
    method(batch(name, generator), torch.zeros(()))
    assert len(forwards) <= len({spec.size for spec in views(name)})


def test_a_batch_of_one_is_refused_in_one_line(name: str):
    method, _ = make(name)
    with pytest.raises(ConfigError, match=r"^[^\n]*got a batch of 1$"):
        method.config.check(1, labelled=True)
