"""The Triton kernels compiled for GPUs that are not here: shared memory, registers and spills."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""What a block may have on an A100, an H100 or H200, a B200."""

SPILLED_BYTES = {"3.6": 128, "3.7": 128}
"""Of a thread, at most, by version of Triton; 16 with later ones.  Triton 3.6 keeps up to 32 of 255 registers of the
gradient's kernel in memory where 3.8 keeps 4 at most: of tiles that were the fastest on an H200.  A tile too large
spills hundreds of bytes with any."""

SCRIPT = """
import itertools, json, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sslx_kernels.nt_xent import fused, triton_kernels

folder, capability, *dims = sys.argv[1:]
for name, dim, shift_free in itertools.product(["sums_kernel", "gradient_kernel"], map(int, dims), [True, False]):
    blocks = fused.backward_blocks if name == "gradient_kernel" else fused.forward_blocks
    blocks = blocks(dim, int(capability) // 10)
    constants = dict(NUM_SKIP=2, SHIFT_FREE=shift_free, D=dim, BD=dim, BM=blocks.rows, BN=blocks.cols)
    if name == "gradient_kernel":
        constants |= dict(ON_COLUMNS=False, HAS_ROW=True, HAS_COL=True, BOOST=fused.BOOST)
    else:
        side = 2 * max(blocks.rows, blocks.cols)
        constants |= dict(SYMMETRIC=shift_free, PANELS=side // blocks.rows, TILES=side // blocks.cols)
    kernel = getattr(triton_kernels, name)
    kinds = {"x": "*fp16", "y": "*fp16", "skip": "*i32", "N": "i32", "M": "i32"}
    signature = {a: "constexpr" if a in constants else kinds.get(a, "*fp32") for a in kernel.arg_names}
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs={})
    compiled = triton.compile(source, target=GPUTarget("cuda", int(capability), 32), options=options)
    path = f"{folder}/{name}-{dim}-{shift_free}.cubin"
    open(path, "wb").write(compiled.asm["cubin"])
    print(json.dumps([path, compiled.metadata.shared]))
"""


def usage(path: str) -> dict[str, int]:
    """Registers, stack and local memory of the one kernel in a cubin, by the cuobjdump that Triton brings."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    told = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}


@pytest.mark.slow
@pytest.mark.parametrize("capability", list(SHARED_BYTES))
def test_kernels_fit_the_gpu_and_do_not_spill(tmp_path: Path, capability: int) -> None:
    dims = (64, 128, 256)
    argv = [sys.executable, "-c", SCRIPT, str(tmp_path), str(capability), *map(str, dims)]
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(argv, capture_output=True, text=True, env=environ, timeout=850, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    most = SPILLED_BYTES.get(".".join(metadata.version("triton").split(".")[:2]), 16)
    assert len(lines) == 4 * len(dims)
    for path, shared in lines:
        found = usage(path)
        assert shared <= SHARED_BYTES[capability], path
        assert 0 < found["REG"] <= 255, path
        assert found["STACK"] + found["LOCAL"] <= most, path
