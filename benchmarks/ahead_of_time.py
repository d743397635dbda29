"""NT-Xent's Triton kernels as they are launched on a GPU, compiled without one, and what the machine code needs."""

import re
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import sslx.losses
from sslx_kernels.nt_xent import fused
from sslx_kernels.nt_xent.rows import Block, Excluded, Rows

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that Triton specializes it for."""

    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    """Positions of arguments (addresses, sizes) that are multiples of 16."""

    def __str__(self) -> str:
        return f"{self.name} " + ", ".join(f"{key}={value}" for key, value in self.constants)


def launch_of(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Launch:
    """The specialization that Triton's launcher derives from the arguments."""
    signature: dict[str, str] = {}
    fixed, aligned = dict(constants), list[int]()
    for at, name in enumerate(kernel.arg_names):
        value: Any = arguments[at] if at < len(arguments) else None
        if at >= len(arguments) or (not isinstance(value, Tensor) and value == 1):
            fixed.setdefault(name, value)
            signature[name] = "constexpr"
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:  # allocations start at multiples of 256
                aligned.append(at)
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(at)
    return Launch(kernel.fn.__name__, tuple(signature.items()), tuple(fixed.items()), tuple(aligned))


@contextmanager
def recorded(capability: int) -> Generator[list[Launch]]:
    """Record what ``fused`` launches within it, as on a GPU of this capability (90 for sm_90), without one."""
    launches: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], x: Tensor, *rest: Any, **constants: Any) -> None:
        assert all(0 < n < limit for n, limit in zip(grid, (2**31, 2**16), strict=False)), (kernel, grid)
        launches.append(launch_of(kernel, (x, *rest), constants))

    def generation(device: torch.device) -> int:  # noqa: ARG001
        return capability // 10

    before: tuple[Callable[..., Any], Callable[..., Any]] = fused.launch, fused.generation
    fused.launch, fused.generation = record, generation
    try:
        with FakeTensorMode():
            yield launches
    finally:
        fused.launch, fused.generation = before


def simclr(batch_size: int, dim: int, temperature: float) -> None:
    """Run SimCLR's loss and its backward pass on fake tensors, by the operators' own code."""
    losses: Any = sys.modules[sslx.losses.nt_xent.__module__]
    z1, z2 = (torch.empty(batch_size, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    t, one = torch.full((), temperature, device="cuda"), torch.ones((), device="cuda")
    _, *saved = losses._forward._init_fn(z1, z2, t, temperature, "fused", "")
    losses._backward._init_fn(one, t, *saved, temperature, "fused", "", False)


def two_sets(num_rows: int, num_columns: int, dim: int, shift_free: bool) -> None:
    """Run rows against other columns, with their gradient: InfoNCE, and rows of other ranks."""
    rows, columns = (torch.empty(n, dim, device="cuda", dtype=torch.float16) for n in (num_rows, num_columns))
    index = torch.empty(num_rows, device="cuda", dtype=torch.int64)
    t, one = torch.full((), 0.1, device="cuda"), torch.ones((), device="cuda")
    op: Any = sys.modules["sslx_kernels.nt_xent.op"]
    _, *saved = op.forward._init_fn(rows, columns, index, index, t, shift_free, "fused")
    op.backward._init_fn(one, *saved, index, index, t, shift_free, "fused", True, True)
    own, remote = fused.prepare(rows), fused.prepare_received(columns)
    none: Excluded = ()
    sums = [fused.sums(own, None, None, t, shift_free), fused.sums(own, remote, none, t, shift_free)]
    _, kept, negative_probs = fused.loss_from_sums(own, None, None, sums, t, shift_free)
    blocks = [Block(None, None), Block(Rows(*remote), none, torch.empty(num_columns, device="cuda"))]
    fused.gradient(own, blocks, kept, negative_probs, one, t, shift_free)


def compiled(launch: Launch, capability: int) -> tuple[bytes, int]:
    """The machine code for sm_``capability``, and the bytes of shared memory per block."""
    kernel, constants = getattr(fused.triton_kernels, launch.name), dict(launch.constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    attributes = {(at,): [["tt.divisibility", 16]] for at in launch.aligned}
    source = ASTSource(fn=kernel, signature=dict(launch.signature), constexprs=constants, attrs=attributes)
    kernel_code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return kernel_code.asm["cubin"], kernel_code.metadata.shared


def usage(cubin: Path) -> dict[str, int]:
    """Registers, stack and local memory of the kernel, by the cuobjdump that comes with Triton."""
    argv = [TOOLS / "cuobjdump", "--dump-resource-usage", cubin]
    output = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", output)}


def inner_loop(cubin: Path) -> int:
    """Instructions of a thread per tile: those on the shortest path through the innermost loop with a matrix product.

    The shortest path is that of tiles that need no mask.  0 if there is no such loop.
    """
    text = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    labels, code = dict[str, int](), list[str]()
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            code.append(instruction[1].strip())
    targets = {i: labels[to[1]] for i, text in enumerate(code) if (to := re.search(r"\bBRA\b.*?(\.L_\w+)", text))}
    loops = [(to, at) for at, to in targets.items() if to <= at]
    multiplying = [loop for loop in loops if any(re.search(r"\b\w*MMA\b", code[i]) for i in range(*loop))]
    if not multiplying:
        return 0
    first, last = max(multiplying)
    length = {first: 1}
    for at in range(first, last):
        if at not in length:
            continue
        always = re.match(r"(BRA|EXIT)\b(?!.*\bU?P\d)", code[at])  # no predicate before or behind it
        for following in {targets.get(at, at + 1), at + 1 if not always else targets.get(at, last)}:
            if following > at:
                length[following] = min(length.get(following, len(code)), length[at] + 1)
    return length[last]
