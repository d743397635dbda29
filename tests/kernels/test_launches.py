"""What NT-Xent launches on a GPU, counted on fake CUDA tensors; where; and which GPUs take the Triton kernels."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import sslx.losses  # noqa: F401
from sslx_kernels.nt_xent import choose, dense, nt_xent

pytest.importorskip("triton")
from sslx_kernels.nt_xent import fused

losses = sys.modules["sslx.losses.nt_xent"]
NO_LAUNCH = (
    "detach view _unsafe_view slice select split alias expand t transpose permute unsqueeze squeeze as_strided "
    "empty empty_like new_empty empty_strided new_empty_strided is_same_size"
).split()


class Launches(TorchDispatchMode):
    """The operators that run something on the device, and what comes from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select"):
            raise AssertionError(f"aten.{name} waits for the device")
        found = func(*args, **(kwargs or {}))
        tensors = [t for t in (found if isinstance(found, tuple | list) else [found]) if isinstance(t, Tensor)]
        assert all(t.device.type == "cuda" for t in tensors), name
        if tensors and name not in NO_LAUNCH:
            self.names.append(name)
        return found


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """A dispatch mode that the Triton kernels are counted by, too."""
    mode = Launches()
    real = fused.launch

    def launch(kernel: Any, grid: Any, x: Tensor, *args: Any, **constants: Any) -> None:
        assert all(t.device == x.device for t in args if isinstance(t, Tensor)), kernel
        mode.names.append(kernel.fn.__name__)
        real(kernel, grid, x, *args, **constants)

    monkeypatch.setattr(fused, "launch", launch)
    return mode


def step(temperature: float | Tensor, size: int, dtype: torch.dtype, impl: str) -> None:
    """SimCLR's loss and its gradients, by the operators' own code: autograd's engine cannot run without a driver."""
    z1, z2 = torch.empty(2 * size, 128, device="cuda", dtype=dtype).chunk(2)
    lowest = 0.1 if isinstance(temperature, Tensor) else temperature
    t = losses.kernels.as_tensor(temperature, z1)
    loss, *saved = losses._forward._init_fn(z1, z2, t, lowest, impl, "")
    gradient = torch.ones_like(loss)  # as loss.backward() makes it
    d, dt = losses._backward._init_fn(gradient, t, *saved, lowest, impl, "", isinstance(temperature, Tensor))
    d1, d2 = d.to(dtype).chunk(2)
    assert d1.shape == d2.shape == z1.shape
    assert dt.shape == (() if isinstance(temperature, Tensor) else (0,))


@pytest.mark.parametrize("size", [512, 4096, 65_536])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_simclrs_loss_and_gradients_are_at_most_12_launches(count: Launches, size: int, temperature: float) -> None:
    with FakeTensorMode(), count:
        step(temperature, size, torch.bfloat16, "fused")
    kernels = [name for name in count.names if name.endswith("_kernel")]
    assert kernels == ["prepare_kernel", "sums_kernel", "loss_kernel", "gradient_kernel", "raw_gradient_kernel"]
    assert len(count.names) <= 9, count.names


def test_a_temperature_to_learn_costs_a_launch_or_two(count: Launches) -> None:
    with FakeTensorMode(), count:
        step(torch.empty((), device="cuda"), 512, torch.bfloat16, "fused")
    assert 9 <= len(count.names) <= 11, count.names


def test_a_small_batch_in_fp32_is_a_third_of_the_launches(count: Launches) -> None:
    """Where the Triton kernels do not run, the dense form does, up to the size of a tile."""
    with FakeTensorMode(), count:
        step(0.1, 128, torch.float32, "tiled")
        tiled = len(count.names)
        count.names.clear()
        z1, z2 = torch.empty(256, 128, device="cuda").chunk(2)
        assert dense.fits(z1, True)
        ctx = SimpleNamespace(save_for_backward=lambda *saved: setattr(ctx, "saved_tensors", saved))
        ctx.needs_input_grad = (True, True, False)
        loss = dense._Dense.forward(ctx, z1, z2, 0.1)
        with torch.no_grad():
            dense._Dense.backward(ctx, torch.ones_like(loss))
    assert len(count.names) <= 50 < tiled, count.names


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    current = ["cuda:0"]

    @contextmanager
    def device_of(tensor: Any) -> Any:
        before, current[0] = current[0], tensor.device
        yield
        current[0] = before

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **_: ran.append((grid, current[0], args[1]))

    ran: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x: Any = SimpleNamespace(device="cuda:1")
    fused.launch(Kernel(), (3,), x, 7, BM=16)
    assert ran == [((3,), "cuda:1", 7)]
    assert current == ["cuda:0"]


@pytest.mark.parametrize(
    ("capability", "impl"), [((7, 0), "tiled"), ((7, 5), "tiled"), ((8, 0), "fused"), ((12, 0), "fused")]
)
def test_gpus_before_ampere_take_the_tiled_form(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], impl: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with FakeTensorMode():
        rows = torch.empty(8, 128, device="cuda", dtype=torch.bfloat16)
        assert choose("auto", rows) == impl
        if impl == "tiled":
            with pytest.raises(ValueError, match=r"compute capability 8\.0 or higher, got 7") as raised:
                choose("fused", rows)
            assert "\n" not in str(raised.value)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one() -> None:
    z = torch.randn(64, 32, device="cuda:1", dtype=torch.bfloat16)
    own = torch.arange(64, device="cuda:1")
    truth = nt_xent(z.double(), z.double(), own, own.roll(32), 0.1, "reference").item()
    assert nt_xent(z, z, own, own.roll(32), 0.1, "fused").item() == pytest.approx(truth, rel=1e-5)
