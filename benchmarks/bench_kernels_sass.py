"""NT-Xent's Triton kernels compiled for GPUs that are not here: registers, shared memory, instructions for each tile.

    python benchmarks/bench_kernels_sass.py
    python benchmarks/bench_kernels_sass.py --capabilities 80 90 100 --dims 64 128 256

No GPU is needed.  The kernels, with the tiles, the alignment and the modes that a step at B = 512 and B = 65,536
launches, are compiled by Triton and read back by the disassembler that it brings.  "Instructions" are those that a
thread of the kernel runs for a tile that needs no mask.
"""

import argparse
import json
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import ahead_of_time

from sslx.bench import measure

RESULTS = Path(__file__).parent / "results" / "kernels_sass.jsonl"


def launches(capability: int, dim: int, simclr_only: bool) -> list[ahead_of_time.Launch]:
    """What is launched for rows of ``dim`` numbers, each once."""
    with ahead_of_time.recorded(capability) as found:
        for temperature in (0.1, 0.01):  # either side of the switch to shifted exponents
            for batch_size in (512, 65_536):
                ahead_of_time.simclr(batch_size, dim, temperature)
        if not simclr_only:
            for shift_free in (True, False):
                ahead_of_time.two_sets(1_000, 1_040, dim, shift_free)
    return list(dict.fromkeys(found))


def measured(launch: ahead_of_time.Launch, capability: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        code, shared = ahead_of_time.compiled(launch, capability)
        cubin.write_bytes(code)
        usage, instructions = ahead_of_time.usage(cubin), ahead_of_time.inner_loop(cubin)
    line = {"capability": capability, "kernel": launch.name, "constants": dict(launch.constants)}
    line |= {"shared_bytes": shared, "registers": usage["REG"], "spilled_bytes": usage["STACK"] + usage["LOCAL"]}
    return line | {"tile_instructions": instructions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", type=int, nargs="+", default=[90], help="90 for sm_90")
    parser.add_argument("--dims", type=int, nargs="+", default=[128])
    parser.add_argument("--simclr-only", action="store_true", help="without what only other losses and ranks launch")
    parser.add_argument("--json", action="store_true", help="print each kernel as a line of JSON")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    common = {"benchmark": "kernels_sass", "triton": metadata.version("triton")}
    for capability in args.capabilities:
        for dim in args.dims:
            for launch in launches(capability, dim, args.simclr_only):
                line = measured(launch, capability)
                c = line["constants"]
                mode = ", ".join(f"{key}={c[key]}" for key in ("NAMED", "SYMMETRIC", "SHIFT_FREE", "TILES") if key in c)
                print(
                    json.dumps(line)
                    if args.json
                    else f"sm_{capability} D={dim} {launch.name} ({mode}): {line['registers']} registers, "
                    f"{line['spilled_bytes']} bytes spilled, {line['shared_bytes']:,} bytes shared, "
                    f"{line['tile_instructions']:,} instructions for each tile",
                    flush=True,
                )
                if not args.no_record:
                    measure.append(args.results, {**common, **line})


if __name__ == "__main__":
    main()
