"""Other CPUs, imitated on this one: the environment in which libraries use an older CPU's instructions only.

``python tests/kit/instruction_sets.py`` lists the names, ``... NAME`` prints the environment, a NAME=VALUE a line:
what ``tests/run.sh --isa NAME`` sets.  Libraries read it at their start, so it holds for new processes only.
"""

import os
import sys

TORCH = {  # ours: torch's own kernels, oneDNN's, MKL's, OpenBLAS's (numpy, scipy)
    "sse": ("default", "SSE41", "SSE4_2", "Nehalem"),
    "avx2": ("avx2", "AVX2", "AVX2", "Haswell"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512", "SkylakeX"),
}
NAMES = tuple(TORCH)


def environment(name: str) -> dict[str, str]:
    """The variables that imitate a CPU with these instructions, on a CPU that has them all."""
    if name not in TORCH:
        raise ValueError(f"expected one of {', '.join(NAMES)}, got {name!r}")
    aten, onednn, mkl, openblas = TORCH[name]
    features = _numpy_features(name)
    return {
        "ATEN_CPU_CAPABILITY": aten,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "MKL_ENABLE_INSTRUCTIONS": mkl,
        "OPENBLAS_CORETYPE": openblas,
        **({"NPY_DISABLE_CPU_FEATURES": " ".join(features)} if features else {}),
    }


def supported() -> list[str]:
    """The names that this CPU can imitate."""
    with open("/proc/cpuinfo") as lines:
        flags = next((line.split() for line in lines if line.startswith("flags")), [])
    needed = {"sse": "sse4_2", "avx2": "avx2", "avx512": "avx512bw"}
    return [name for name in NAMES if needed[name] in flags]


def _numpy_features(name: str) -> list[str]:
    """What numpy's own kernels must not use; numpy names these features anew from time to time."""
    os.environ.pop("NPY_DISABLE_CPU_FEATURES", None)  # of a call from within such an environment
    import numpy

    core = getattr(numpy, "_core", None) or numpy.core
    features = [f for f, here in core._multiarray_umath.__cpu_features__.items() if here]
    optional = [f for f in core._multiarray_umath.__cpu_dispatch__ if f in features]
    wide = [f for f in optional if f.startswith("AVX512") or f == "X86_V4"]
    if name == "avx512":
        return []
    return wide if name == "avx2" else optional


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in NAMES:
        sys.stderr.write(f"error: expected one of {', '.join(NAMES)}: those that this CPU has: {supported()}\n")
        raise SystemExit(64)
    if sys.argv[1] not in supported():
        sys.stderr.write(f"error: this CPU has no {sys.argv[1]} to imitate it with, it has {supported()}\n")
        raise SystemExit(69)
    for variable, value in environment(sys.argv[1]).items():
        sys.stdout.write(f"{variable}={value}\n")
