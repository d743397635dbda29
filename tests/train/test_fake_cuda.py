"""Every method's step on a GPU that is not there: where its tensors are, and what the host waits for."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import fake_cuda
import fake_step
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kit import tiny
from sslx import methods, optim
from sslx.config import PretrainConfig
from sslx.data.batch import Batch
from sslx.methods import simclr
from sslx.methods.base import Embedded
from sslx.monitor.health import Config as HealthConfig
from sslx.monitor.health import Health
from sslx.probe import features, knn
from sslx.train.verify import narrow

SIZE, PER_RANK = 32, 8
ENCODERS = {"resnet": tiny.RESNET, "vit": replace(tiny.VIT, patch=8)}
OPTIM: dict[str, Any] = {"clip": 1.0, "weight_decay_end": 0.1, "layer_decay": 0.9}
FAST = [("simclr", "resnet"), ("byol", "resnet"), ("mae", "vit")]
SLOW = pytest.mark.slow
Harm = Callable[[Tensor], Tensor]


def settings(name: str, encoder: str, optimizer: Any = "sgd", **changes: Any) -> PretrainConfig:
    method = narrow(methods.module(name).Config())
    return PretrainConfig(
        method=method, encoder=ENCODERS[encoder], optim=optim.Config(name=optimizer, **OPTIM), **changes
    )


@contextmanager
def on_cuda(config: PretrainConfig, *, may_read: bool = False) -> Generator[tuple[fake_step.Run, fake_cuda.Counts]]:
    method, specs = fake_step.build(config, SIZE)
    with fake_cuda.on(may_read=may_read) as counts:
        yield fake_step.Run(config, method, specs, PER_RANK), counts


# ---------------------------------------------------------------- every method


@pytest.mark.parametrize(
    ("chunks", "optimizers"),
    [(1, ("lars",)), pytest.param(1, ("sgd", "adamw"), marks=SLOW), pytest.param(2, ("sgd", "lars"), marks=SLOW)],
)
@pytest.mark.parametrize(
    ("name", "encoder"),
    [pytest.param(*case, marks=() if case in FAST else SLOW) for case in tiny.CASES],
)
def test_a_step_stays_on_the_gpu_and_the_host_never_waits(
    name: str, encoder: str, chunks: int, optimizers: tuple[str, ...]
) -> None:
    """With the options of the optimizer that are off by default."""
    for optimizer in optimizers:
        config = settings(name, encoder, optimizer, num_grad_cache_chunks=chunks)
        with on_cuda(config) as (run, counts):
            run.step()
            counts.forget()
            run.step()
        assert (len(counts.copies), counts.blocking) == (chunks, 0), "one for each batch"
        assert counts.launches > 50
        trained = {key: p for key, p in run.method.named_parameters() if p.requires_grad}
        assert all(p.grad is not None and p.grad.shape == p.shape for p in trained.values())
        everything = [*run.method.parameters(), *run.method.buffers(), *(p.grad for p in trained.values())]
        state = [value for of_one in run.optimizer.state.values() for value in of_one.values()]
        assert {str(t.device) for t in [*everything, *state] if isinstance(t, Tensor)} == {"cuda:0"}


@pytest.mark.parametrize(("name", "encoder"), tiny.CASES)
def test_the_gradients_of_this_backward_are_those_of_torchs_engine(name: str, encoder: str) -> None:
    method = tiny.narrowed(name, encoder).double()
    images = tiny.batch(method, torch.Generator(), PER_RANK)
    state = {key: value.clone() for key, value in method.state_dict().items()}
    gradients = list[dict[str, Tensor]]()
    for backward in (torch.Tensor.backward, fake_cuda.backward):
        method.load_state_dict(state)
        method.zero_grad(set_to_none=True)
        backward(method(images).loss)
        gradients.append({key: p.grad for key, p in method.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-9, atol=1e-12, msg=key)


# ---------------------------------------------------------------- what is looked at now and then


@pytest.mark.parametrize(("name", "encoder"), [("simclr", "resnet"), ("mae", "vit"), ("jigsaw", "resnet")])
def test_health_and_the_online_probe_read_their_numbers_and_little_else(name: str, encoder: str) -> None:
    with on_cuda(settings(name, encoder), may_read=True) as (run, counts):
        batches = run.batches()
        found = Health(HealthConfig(num_samples=PER_RANK), fake_step.AUTOCAST).look(run.method.exported, batches)
        assert len(found) == 4
        assert len(counts.reads) <= 4, counts.reads  # whether it is finite, its singular values, four numbers
        counts.forget()
        split = features.extract(run.method.exported, batches, autocast=fake_step.AUTOCAST, num_samples=PER_RANK)
        assert split.x.device.type == "cpu"
        assert len(counts.reads) <= 3 * len(batches), counts.reads
        counts.forget()


def test_knn_reads_the_number_of_right_answers() -> None:
    bank, queries = (
        features.Features(torch.randn(number, 16), torch.arange(number) % 4, torch.arange(number))
        for number in (64, 32)
    )
    with fake_cuda.on(may_read=True) as counts:
        knn.accuracy(bank, queries, 4, device=fake_step.DEVICE)
    assert 1 <= len(counts.reads) <= 3, counts.reads


# ---------------------------------------------------------------- planted faults


HARMS: dict[str, tuple[Harm, str]] = {
    "reads a number": (lambda z: z * z.detach().abs().max().item(), "aten._local_scalar_dense waits for the GPU"),
    "asks whether": (lambda z: z if z.detach().max() > 0 else -z, "aten._local_scalar_dense waits for the GPU"),
    "indexes by a mask": (lambda z: z[z.detach().sum(1) > 0], "aten.index waits for the GPU"),
    "copies to the host": (lambda z: z.cpu().to(z.device), "aten._to_copy waits for the GPU"),
    "counts values": (lambda z: z * z.detach().long().flatten().unique().numel(), "unique2 waits for the GPU"),
    "takes a tensor of the CPU": (lambda z: z * torch.ones(z.shape[1]), r"two (different )?devices,? cuda:0"),
}


@pytest.mark.parametrize("kind", HARMS)
def test_a_planted_fault_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    harm, error = HARMS[kind]

    def harmed(self: simclr.Method, images: Batch) -> Embedded:
        first, *rest = embed(self, images).compared
        return Embedded((harm(first), *rest))

    embed = simclr.Method.embed
    with on_cuda(settings("simclr", "resnet")) as (run, _):
        run.step()
        monkeypatch.setattr(simclr.Method, "embed", harmed)
        with pytest.raises((fake_cuda.HostWait, RuntimeError), match=error):
            run.step()


def test_a_planted_fault_in_a_custom_operators_backward_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from sslx_kernels.nt_xent import op

    temperature_gradient = op.temperature_gradient

    def harmed(shares: Tensor, *rest: Any) -> Any:
        assert shares.abs().max().item() >= 0
        return temperature_gradient(shares, *rest)

    monkeypatch.setattr(op, "temperature_gradient", harmed)
    with on_cuda(settings("simclr", "resnet")) as (run, _):
        with pytest.raises(fake_cuda.HostWait, match="_local_scalar_dense"):
            run.step()


def test_a_copy_from_the_host_in_a_step_is_counted() -> None:
    with fake_cuda.on() as counts:
        there = torch.empty(4, device="cuda")
        assert not counts.copies
        there.add_(torch.arange(4.0).to("cuda"))
        there.copy_(torch.arange(4.0), non_blocking=True)
        assert counts.copies == [16, 16]
        assert counts.blocking == 2, "pageable memory"


# ---------------------------------------------------------------- what is counted


def test_launches_bytes_and_peak_are_those_of_a_product_and_an_activation() -> None:
    with fake_cuda.on() as counts:
        x, weight = torch.empty(64, 32, device="cuda"), nn.Parameter(torch.empty(16, 32, device="cuda"))
        y = F.linear(x, weight).relu()  # a transposed view, a product, an activation
        assert (counts.operators["mm"], counts.operators["relu"], counts.launches) == (1, 1, 2)
        assert counts.moved_bytes == 4 * (64 * 32 + 32 * 16 + 64 * 16) + 4 * 2 * 64 * 16
        assert counts.peak_bytes == 4 * (64 * 32 + 16 * 32 + 2 * 64 * 16)
        del x
        y = y.detach() + 1  # the graph, its saved input and the first activation are gone
        before = counts.peak_bytes
        for _ in range(5):
            y = y * 2
        assert counts.peak_bytes == before, "each takes the place of the one before"


@pytest.mark.parametrize(
    ("sizes", "launches"),
    [
        ([10] * 5, 1),
        ([10] * 64, 1),  # as many as fit beside two lists
        ([10] * 65, 2),
        ([65536 * 320], 1),
        ([65536 * 321], 2),
        ([65536 * 200, 65536 * 200], 2),
    ],
)
def test_operators_on_lists_take_the_launches_that_torch_makes(sizes: list[int], launches: int) -> None:
    with fake_cuda.on() as counts:
        a, b = ([torch.empty(size, device="cuda") for size in sizes] for _ in range(2))
        torch._foreach_add_(a, b)
    assert counts.launches == launches


def test_it_leaves_torch_as_it_was() -> None:
    before = torch.Tensor.backward, torch.cuda.is_bf16_supported, torch.cuda.current_device
    with fake_cuda.on():
        pass
    assert (torch.Tensor.backward, torch.cuda.is_bf16_supported, torch.cuda.current_device) == before
    x = torch.ones(3, requires_grad=True)
    x.square().sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2, 2]
