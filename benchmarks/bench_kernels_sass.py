"""Registers, shared memory and instructions of NT-Xent's Triton kernels, compiled for GPUs that need not be present.

    python benchmarks/run.py kernels_sass
    python benchmarks/run.py kernels_sass --capabilities 80 90 100 --dims 64 128 256

Triton compiles the kernels with the tiles, alignment and modes of a step at B = 512 and at B = 65,536, and the
disassembler that comes with Triton reads them.  "Instructions" are those of a thread for a tile that needs no mask.
"""

import json
import tempfile
from importlib import metadata
from pathlib import Path

import ahead_of_time
from harness import Record, Session, benchmark, option


def launches(capability: int, dim: int, simclr_only: bool) -> list[ahead_of_time.Launch]:
    """The different launches for rows of ``dim`` numbers."""
    with ahead_of_time.recorded(capability) as launched:
        for temperature in (0.1, 0.01):  # on either side of the switch to shifted exponents
            for batch_size in (512, 65_536):
                ahead_of_time.simclr(batch_size, dim, temperature)
        if not simclr_only:
            for shift_free in (True, False):
                ahead_of_time.two_sets(1_000, 1_040, dim, shift_free)
    return list(dict.fromkeys(launched))


def resources(launch: ahead_of_time.Launch, capability: int) -> Record:
    """What a compiled kernel takes."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        code, shared_bytes = ahead_of_time.compiled(launch, capability)
        cubin.write_bytes(code)
        usage, instructions = ahead_of_time.usage(cubin), ahead_of_time.inner_loop(cubin)
    figures: Record = {"capability": capability, "kernel": launch.name, "constants": dict(launch.constants)}
    figures |= {"shared_bytes": shared_bytes, "registers": usage["REG"]}
    return figures | {"spilled_bytes": usage["STACK"] + usage["LOCAL"], "tile_instructions": instructions}


@benchmark(
    option("--capabilities", type=int, nargs="+", default=[90], help="such as 90 for sm_90"),
    option("--dims", type=int, nargs="+", default=[128]),
    option("--simclr-only", action="store_true", help="leave out what only other losses and several ranks launch"),
)
def run(session: Session) -> None:
    options = session.options
    for capability in options.capabilities:
        for dim in options.dims:
            for launch in launches(capability, dim, options.simclr_only):
                figures = resources(launch, capability)
                print(json.dumps(figures), flush=True)
                session.record(triton=metadata.version("triton"), **figures)
