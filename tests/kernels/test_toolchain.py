"""What Triton needs to build its launcher, held against Triton itself with compiler or headers hidden."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kit.python import python
from sslx_kernels import nt_xent, toolchain

SCRIPT = """
import contextlib, os, sys
if "HIDE_HEADERS" in os.environ:
    sys.base_prefix = "/no/such/python"  # as where only the interpreter is installed
from sslx_kernels import toolchain
from triton.runtime.build import compile_module_from_src
source = '''
#include <Python.h>
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "built", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_built(void) { return PyModule_Create(&definition); }
'''
try:
    compile_module_from_src(src=source, name="built", library_dirs=[], include_dirs=[], libraries=[])
    print("built")
except Exception as error:
    print(type(error).__name__)
print(toolchain.missing())
"""
COMPILER, HEADERS = "a C compiler", "Python's headers (Python.h)"


@pytest.mark.slow
@pytest.mark.skipif(bool(toolchain.missing()), reason=f"needs {toolchain.missing()}")
@pytest.mark.parametrize(
    ("environ", "missing"),
    [
        ({}, ""),
        ({"PATH": "/no/such/folder"}, COMPILER),
        ({"CC": "/no/such/compiler"}, "the C compiler CC=/no/such/compiler"),
        ({"CC": "gcc -O1"}, "the C compiler CC=gcc -O1"),
        ({"HIDE_HEADERS": "1"}, HEADERS),
        ({"HIDE_HEADERS": "1", "PATH": "/no/such/folder"}, f"{COMPILER} and {HEADERS}"),
    ],
)
def test_it_finds_missing_what_tritons_own_build_then_lacks(
    environ: dict[str, Any], missing: str, tmp_path: Path
) -> None:
    done = python("-c", SCRIPT, without=("CC",), TRITON_CACHE_DIR=str(tmp_path), **environ)
    outcome, said = done.stdout.splitlines()
    assert said == missing
    assert (outcome == "built") is (missing == "")


def test_fused_says_what_is_missing_and_auto_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decision for a CUDA device, on a machine without a compiler."""
    for name in ("CC", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/no/such/folder")
    monkeypatch.setattr(nt_xent, "_MISSING_TOOLS", toolchain.missing())  # as at its import
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = torch.empty(8, 4, device="cuda", dtype=torch.bfloat16)
    assert nt_xent.choose("auto", rows) == "tiled"
    with pytest.raises(ValueError, match="needs a C compiler") as raised:
        nt_xent.choose("fused", rows)
    expected = "impl='fused' needs a C compiler: apt install gcc python3-dev; use impl='tiled' or 'auto'"
    assert str(raised.value) == expected
