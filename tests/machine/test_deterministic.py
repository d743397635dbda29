"""``--deterministic``: what it sets, and what is said of an operator that cannot be computed in the same way twice."""

import json
from typing import Any

import pytest
import torch

from kit.python import python
from sslx.config import load
from sslx.distributed import Ranks
from sslx.machine import deterministic
from sslx.train import launch
from sslx.train.build import build
from sslx.train.pretrain import Position

SMALL = ["simclr_digits", "--data.size", "16", "--encoder.layers", *"1111", "--encoder.channels", *"8888"]
SCRIPT = """
import json, os, torch
from sslx.machine import deterministic
deterministic.configure(%s)
from torch._inductor import config
print(json.dumps({
    "benchmark": torch.backends.cudnn.benchmark,
    "cudnn": torch.backends.cudnn.deterministic,
    "algorithms": torch.are_deterministic_algorithms_enabled(),
    "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
    "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    "inductor": getattr(config, "deterministic", None),
    "decoder": deterministic.decoder_load(),
}))
"""


def settled(on: bool, **environ: Any) -> dict[str, object]:
    return json.loads(python("-c", SCRIPT % on, without=("CUBLAS_WORKSPACE_CONFIG",), **environ).stdout)


@pytest.mark.slow
def test_what_it_sets() -> None:
    """In processes of their own, as some of it is for good."""
    on, off = settled(True), settled(False)
    known = None if on["inductor"] is None else True
    assert on == {
        "benchmark": False, "cudnn": True, "algorithms": True, "warn only": False, "cublas": ":4096:8",
        "inductor": known, "decoder": 0.0,
    }  # fmt: skip
    assert off == {
        "benchmark": True, "cudnn": False, "algorithms": False, "warn only": False, "cublas": None,
        "inductor": known and False, "decoder": 0.75,
    }  # fmt: skip
    assert settled(True, CUBLAS_WORKSPACE_CONFIG=":16:8")["cublas"] == ":16:8"


def test_a_run_computes_as_its_config_says_whatever_was_before() -> None:
    for flags, on in ((["--deterministic"], True), ([], False)):
        config = load([*SMALL, *flags, "--precision", "fp32"])
        assert config.deterministic is on
        torch.backends.cudnn.allow_tf32 = True
        build(config, Ranks(device=torch.device("cpu")), lambda _: None)
        assert torch.are_deterministic_algorithms_enabled() is torch.backends.cudnn.deterministic is on
        assert torch.backends.cudnn.benchmark is not on
        assert not torch.backends.cudnn.allow_tf32, "fp32 was asked for"


def test_an_operator_without_a_deterministic_form_ends_the_run_in_one_line() -> None:
    deterministic.configure(True)
    try:
        with pytest.raises(RuntimeError) as error:
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    finally:
        deterministic.configure(False)
    explained = launch.explain(error.value, Position())
    assert explained is not None
    line, code = explained
    assert code == 64
    assert line.startswith("--deterministic: torch has no deterministic put_ for this device")
    assert "\n" not in line
    assert deterministic.explain(RuntimeError("another error")) is None
