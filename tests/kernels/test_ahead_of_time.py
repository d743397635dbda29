"""The Triton kernels as they are launched, compiled for GPUs that are not here: memory, registers, instructions."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from kit.python import python

RUNNER = Path(__file__).parents[2] / "benchmarks" / "run.py"
KIB = 1024
SHARED_BYTES = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
"""What a block may have on an A100, an A10, an L40, an H100 or H200, a B200, an RTX Blackwell."""

VERSION = ".".join(metadata.version("triton").split(".")[:2])
SPILLED_BYTES = {"3.6": 128, "3.7": 128, "3.9": 48}
"""Of a thread, at most, by version of Triton; with 3.8 none on sm_80, 90 and 100, 16 elsewhere.  Triton 3.6 has a few
of 255 registers in memory, of tiles that were the fastest on an H200.  A tile too large spills hundreds of bytes with
any."""


def compiled(*options: str) -> list[dict[str, Any]]:
    """What the script prints of each kernel."""
    done = python(RUNNER, "kernels_sass", "--no-record", *options, without=("TRITON_INTERPRET",))
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


SIZES = 16, 32, 64, 128, 200, 256
"""Of rows.  CI compiles the largest for the two GPUs of whose memory they take the most."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dims"),
    [
        *((86, (256,)), (89, (256,))),
        *(pytest.param(capability, SIZES, marks=pytest.mark.soak) for capability in SHARED_BYTES),
    ],
    ids=lambda value: str(value).replace(", ", "-").strip("(,)"),
)
def test_what_is_launched_fits_the_gpu_and_does_not_spill(capability: int, dims: tuple[int, ...]) -> None:
    named = {"pairs"}
    kernels = compiled("--capabilities", str(capability), "--simclr-only", "--dims", *map(str, dims))
    if capability not in (86, 89):  # whose tiles are those of sm_80
        kernels += compiled("--capabilities", str(capability), "--dims", "128")
        dims, named = (*dims, 128), {"none", "given", "pairs"}
    most = SPILLED_BYTES.get(VERSION, 0 if capability in (80, 90, 100) else 16)
    limit = min(SHARED_BYTES[86], SHARED_BYTES[capability]) if capability == 80 else SHARED_BYTES[capability]
    assert {k["constants"]["D"] for k in kernels} == set(dims)
    sums = [k["constants"] for k in kernels if k["kernel"] == "sums_kernel"]
    assert {c["PANELS"] * c["BM"] // max(c["BM"], c["BN"]) for c in sums if c["SYMMETRIC"]} == {2, 8}
    assert {c["NAMED"] for c in sums} == named
    assert not [k for k in kernels if k["shared_bytes"] > limit]
    assert not [k for k in kernels if not 0 < k["registers"] <= 255]
    assert not [k for k in kernels if k["spilled_bytes"] > most]


@pytest.mark.slow
@pytest.mark.skipif(VERSION in ("3.6", "3.7"), reason="counted with Triton 3.8")
def test_the_inner_loops_have_few_instructions() -> None:
    """On sm_90 at D = 128, of the tiles that need no mask, which are all but those on two diagonals and the edges."""
    kernels = compiled("--capabilities", "90", "--dims", "128", "--simclr-only")
    by_name = [(k["kernel"], k["constants"], k["tile_instructions"]) for k in kernels]
    symmetric = [n for name, c, n in by_name if name == "sums_kernel" and c["SYMMETRIC"]]
    gradients = [n for name, c, n in by_name if name == "gradient_kernel" and c["SHIFT_FREE"]]
    assert len(symmetric) == 2
    assert gradients
    assert all(500 < n <= 1_100 for n in symmetric), by_name
    assert all(200 < n <= 440 for n in gradients), by_name
