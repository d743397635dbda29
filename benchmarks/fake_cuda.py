"""CUDA without a GPU: code runs on fake tensors of device cuda, and what it would do to a GPU is counted.

    with fake_cuda.on() as counts:
        loss = model(torch.empty(8, 3, 32, 32, device="cuda"))
        fake_cuda.backward(loss)
    counts.launches, counts.peak_bytes

Fake tensors (``torch._subclasses.FakeTensorMode``) have shapes, dtypes and devices, but no numbers.  An operator on
tensors of two devices fails.  A custom operator of torch.library runs its own code, down to its Triton kernels, each of
which counts as one launch.  Code that would make the host wait for the GPU raises ``HostWait``.
"""

from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock
from weakref import finalize

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sslx.bench import operators

CAPABILITY, MEMORY_BYTES = (9, 0), 80 << 30
"""Of the fake GPU, an H100."""
_READ = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount"}
# Operators whose result, or whose shape, the host reads; so do all that begin with unique.
_LINALG = ("linalg_eig", "_linalg_eig", "_linalg_svd", "linalg_cholesky", "linalg_inv", "linalg_solve")
# Decompositions, which wait until their solver reports success.
_FREE = {"detach", "alias", "lift_fresh", "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}
# Operators that launch nothing, other than views.
_BLOCK, _MOST_BLOCKS, _MOST_TENSORS = 65536, 320, (0, 110, 64, 48, 36, 30)
# Limits of a launch on lists of tensors: elements per block, blocks, and tensors by number of lists (see
# MultiTensorApply.cuh).


_internals: Any = torch  # what has no public names
_without_modes: Any = _internals.utils._python_dispatch._disable_current_modes
_COMPOSITE = _internals._C.DispatchKey.CompositeImplicitAutograd


class HostWait(AssertionError):
    """At this place the host would wait for the GPU."""


@dataclass
class Counts:
    """What the code would do to a GPU.

    operators: number of calls of each.  launches: number of kernels, one per operator that computes, and as many as
      needed for operators on lists of tensors.
    copies: bytes of each copy from the host.  ``blocking`` of them may make the host wait, because they are not from
      pinned memory or not declared non-blocking.
    collectives: number of collectives on tensors of the GPU.
    reads: operators whose result the host has read, if ``on(may_read=True)`` allows it.
    moved_bytes: bytes of the inputs and outputs of all operators, each read or written once.
    peak_bytes: most memory of tensors on the GPU at any time, without what an allocator adds.
    """

    operators: Counter[str] = field(default_factory=Counter[str])
    launches: int = 0
    collectives: int = 0
    copies: list[int] = field(default_factory=list[int])
    blocking: int = 0
    reads: list[str] = field(default_factory=list[str])
    moved_bytes: int = 0
    peak_bytes: int = 0
    _held_bytes: int = 0
    _held: set[int] = field(default_factory=set[int])
    _pinned: set[int] = field(default_factory=set[int])

    def pin(self, tensor: Tensor) -> None:
        """Treat this tensor of the host, and its parts, as pinned memory."""
        storage = tensor.untyped_storage()
        self._pinned.add(id(storage))
        finalize(storage, self._pinned.discard, id(storage))

    def is_pinned(self, tensor: Tensor) -> bool:
        return id(tensor.untyped_storage()) in self._pinned

    def hold(self, tensors: Iterable[Any]) -> None:
        """Count the memory of the tensors among ``tensors`` until it is freed."""
        for tensor in tensors:
            if not isinstance(tensor, Tensor) or tensor.device.type != "cuda":
                continue
            storage = tensor.untyped_storage()  # the same object for as long as it exists
            if id(storage) not in self._held:
                self._held.add(id(storage))
                self._held_bytes += storage.nbytes()
                self.peak_bytes = max(self.peak_bytes, self._held_bytes)
                finalize(storage, self._free, id(storage), storage.nbytes())

    def forget(self) -> None:
        """Start counting anew; memory that is held stays counted."""
        self.operators.clear()
        self.copies.clear()
        self.reads.clear()
        self.launches = self.collectives = self.blocking = self.moved_bytes = 0
        self.peak_bytes = self._held_bytes

    def _free(self, number: int, nbytes: int) -> None:
        self._held.remove(number)
        self._held_bytes -= nbytes


@contextmanager
def on(*, may_read: bool = False) -> Generator[Counts]:
    """Within it, ``device="cuda"`` gives fake tensors, and operators on them are counted.

    may_read: what the host reads is 1 or True and is counted, instead of raising HostWait.
    """
    counts = Counts()
    with ExitStack() as stack:
        for name, value in {
            "torch.Tensor.backward": backward,
            "torch._subclasses.FakeTensor.tolist": lambda tensor: tensor.cpu().tolist(),  # its own reads one by one
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
            "torch.cuda.is_bf16_supported": lambda *_, **__: True,
            "torch.cuda.get_device_capability": lambda *_: CAPABILITY,
            "torch.cuda.current_device": lambda: 0,
            "torch.cuda.mem_get_info": lambda *_: (MEMORY_BYTES, MEMORY_BYTES),
            "torch.cuda.get_rng_state": lambda *_: torch.get_rng_state(),
            "torch.cuda.set_rng_state": lambda *_: None,
            "sslx_kernels.nt_xent.fused.launch": counts_a_kernel(counts),
            "sslx.data.ahead.ThreadPoolExecutor": _AtOnce,  # fake tensors are those of this thread
        }.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Count(counts, may_read))
        yield counts


class _AtOnce(Executor):
    """Makes everything in the thread that asks for it, when it asks."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = Future[Any]()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def counts_a_kernel(counts: Counts) -> Any:
    """A replacement for the launch of a Triton kernel, which counts it and checks where its tensors are."""

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, constants)) if isinstance(leaf, Tensor)]
        if elsewhere := {str(tensor.device) for tensor in tensors if tensor.device.type != "cuda"}:
            raise RuntimeError(f"a kernel, launched on {grid} blocks, got a tensor on {elsewhere}")
        counts.operators[kernel.fn.__name__] += 1
        counts.launches += 1
        counts.moved_bytes += sum({id(tensor): tensor.nbytes for tensor in tensors}.values())

    return launch


def to_cuda(module: nn.Module) -> None:
    """Replace the parameters and buffers of a module by fake tensors of device cuda; call it within ``on``."""
    fakes = dict[int, Tensor]()

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            there = torch.empty_strided(tensor.shape, tensor.stride(), device="cuda", dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            fakes[id(tensor)] = nn.Parameter(there, tensor.requires_grad) if is_parameter else there
        return fakes[id(tensor)]

    for part in module.modules():
        inside: Any = part
        for tensors in (inside._parameters, inside._buffers):
            tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """``loss.backward()`` with the same gradients, but without torch's engine, which needs a driver.

    Hooks are not called.
    """
    assert loss.grad_fn is not None
    gradients: dict[Any, dict[int, Tensor]] = defaultdict(dict, {loss.grad_fn: {0: torch.ones_like(loss)}})
    node: Any
    for node in reversed(_in_order(loss.grad_fn)):
        arriving = gradients.pop(node, {})
        if hasattr(node, "variable"):
            node.variable.grad = arriving[0] if node.variable.grad is None else node.variable.grad + arriving[0]
            continue
        results = (node.apply if hasattr(node, "apply") else node)(
            *(arriving.get(number) for number in range(len(node._input_metadata)))
        )
        for (source, number), result in zip(node.next_functions, _tuple(results), strict=False):
            if source is None or result is None:
                continue
            like = source._input_metadata[number]
            result = result if result.shape == like.shape else result.sum_to_size(like.shape)
            result = result.to(like.dtype)
            before = gradients[source].get(number)
            gradients[source][number] = result if before is None else before + result


def _in_order(root: Any) -> list[Any]:
    """The nodes of a backward graph, each after all nodes to which it passes gradients."""
    order, seen, stack = list[Any](), set[Any](), [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(source, False) for source, _ in node.next_functions if source is not None]
    return order


def _tuple(results: Any) -> Sequence[Any]:
    return results if isinstance(results, tuple) else (results,)


class _Count(TorchDispatchMode):
    def __init__(self, counts: Counts, may_read: bool) -> None:
        super().__init__()
        self._counts, self._may_read = counts, may_read

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (function := operators.implementation(func)) is not None:
            with self:
                return function(*args, **kwargs)
        if func.namespace != "aten":  # prim::device, which launches nothing; collectives
            self._counts.collectives += func.namespace == "c10d" and _is_on_gpu(tree_leaves((args, kwargs)))
            return func(*args, **kwargs)
        if _internals._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE):  # as within a custom operator
            with self:
                return func.decompose(*args, **kwargs)
        name = func.overloadpacket.__name__
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(isinstance(tensor, FakeTensor) for tensor in inputs) and _stays(kwargs):
            pinned = kwargs.pop("pin_memory", False) if name == "empty" else False
            with _without_modes():  # the numbers are on the host
                result = func(*args, **kwargs)
            if pinned:
                self._counts.pin(result)
            return result
        if _is_on_gpu(inputs) and _reads(name, args, kwargs):
            return self._read(name, func, args, kwargs)
        if name.startswith("_fused_") and name.endswith("_"):  # changes its lists in place; not all have a fake
            result = None
            if len(devices := {str(tensor.device) for tensor in inputs}) > 1:
                raise RuntimeError(f"aten.{name} got tensors on {devices}")
        else:
            result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not func.is_view and _is_on_gpu(outputs or inputs):
            self._add(name, args, kwargs, inputs, outputs)
        return result

    def _add(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        counts = self._counts
        counts.hold(outputs)
        if name in _FREE:
            return
        counts.operators[name] += 1
        if name in ("_to_copy", "copy_") and (source := inputs[-1]).device.type == "cpu":
            counts.copies.append(source.nbytes)
            counts.blocking += not (_is_declared(name, args, kwargs) and counts.is_pinned(source))
            return
        counts.launches += _num_launches(name, args)
        counts.moved_bytes += sum({id(tensor): tensor.nbytes for tensor in (*inputs, *outputs)}.values())

    def _read(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._may_read:
            raise HostWait(f"aten.{name} waits for the GPU")
        self._counts.reads.append(name)
        if name == "_local_scalar_dense":
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if name == "nonzero":  # as if one element were nonzero
            return args[0].new_empty((1, args[0].ndim), dtype=torch.int64)
        if name == "index" and (mask := args[1][0]) is not None and mask.dtype == torch.bool:  # as if all were selected
            return args[0].new_empty((mask.numel(), *args[0].shape[mask.ndim :]))
        result = func(*args, **kwargs)  # fails if the shape depends on numbers
        if name not in ("_to_copy", "copy_"):
            return result
        with _without_modes():
            return torch.ones(tuple(result.shape), dtype=result.dtype)


def _is_on_gpu(leaves: Iterable[Any]) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.device.type == "cuda" for leaf in leaves)


def _stays(kwargs: dict[str, Any]) -> bool:
    """Whether the result of an operator on tensors of the CPU stays there."""
    return torch.device(kwargs.get("device") or "cpu").type == "cpu"


def _reads(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether the host waits for the result of this operator."""
    if name in _READ or name.startswith(("unique", "_unique", *_LINALG)):
        return True
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name == "index" or name.startswith(("index_put", "_index_put")):
        indices = [index for index in args[1] if index is not None]
        return any(index.dtype in (torch.bool, torch.uint8) or index.device.type == "cpu" for index in indices)
    if name == "_to_copy":
        to = torch.device(kwargs.get("device") or args[0].device)
        return args[0].device.type == "cuda" and to.type == "cpu" and not _is_declared(name, args, kwargs)
    if name == "copy_":
        to, source = args[:2]
        return source.device.type == "cuda" and to.device.type == "cpu" and not _is_declared(name, args, kwargs)
    return False


def _is_declared(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a copy is declared ``non_blocking``."""
    return bool(kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))


def _num_launches(name: str, args: Sequence[Any]) -> int:
    """Number of kernels of an operator: one, or on lists of tensors as many as torch splits them into."""
    lists: list[list[Tensor]] = [
        list(arg) for arg in args if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor)
    ]
    if not lists or not name.startswith(("_foreach_", "_fused_")):
        return 1
    if any(a.shape != b.shape for other in lists[1:] for a, b in zip(lists[0], other, strict=True)):
        return len(lists[0])  # torch's slow path: one after another
    most = _MOST_TENSORS[min(len(lists), len(_MOST_TENSORS) - 1)]
    launches = blocks = tensors = 0
    for tensor in lists[0]:
        tensors += 1
        blocks += -(-tensor.numel() // _BLOCK)
        while blocks >= _MOST_BLOCKS:
            launches, blocks, tensors = launches + 1, blocks - _MOST_BLOCKS, int(blocks > _MOST_BLOCKS)
        if tensors == most:
            launches, blocks, tensors = launches + 1, 0, 0
    return launches + bool(tensors)
