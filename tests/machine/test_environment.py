"""Variables of the environment: what is taken, and what is refused in one line that names the variable."""

import re
from pathlib import Path
from typing import Any

import pytest

from kit.processes import is_one_line
from kit.python import python
from sslx.errors import ConfigError
from sslx.machine import environment

SLURM_TASK = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456"}
SLURM_TASK.update(SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="8", SLURM_JOB_NODELIST="n[03-05,9],m1")
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"}


def test_a_task_of_slurm():
    environ = dict(SLURM_TASK)
    assert environment.ranks(environ) == (5, 8, 1)
    assert environ["MASTER_ADDR"] == "n03"
    assert environ["MASTER_PORT"] == str(12_000 + 3_456)
    environ = {**SLURM_TASK, "MASTER_ADDR": "here", "MASTER_PORT": "1234"}
    environment.ranks(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("here", "1234")
    assert environment.ranks({**SLURM_TASK, **TORCHRUN}) == (1, 2, 1)


@pytest.mark.parametrize("absent", [("SLURM_PROCID",), ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS")])
def test_shells_of_slurm_do_not_wait_for_others(absent: tuple[str, ...]):
    shell = {name: value for name, value in SLURM_TASK.items() if name not in absent}
    assert environment.ranks(shell) == (0, 1, 0)
    assert environment.launched_rank(shell) is None
    interactive = {**SLURM_TASK, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}
    assert environment.ranks(interactive) == (0, 1, 0)
    assert "MASTER_PORT" not in interactive


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[1-4]", "n1"), ("r[02-03]c[1,5]-ib,x", "r02c1-ib"), ("a-b[007]", "a-b007")],
)
def test_first_host(nodes: str, first: str):
    assert environment.first_host({"SLURM_JOB_NODELIST": nodes}) == first


BROKEN = {
    "RANK": ("x", "", "1.0", "-1", "2", "1\n2", "9" * 5_000),
    "WORLD_SIZE": ("0", "two", "-2"),
    "LOCAL_RANK": ("abc", "-1"),
    "MASTER_PORT": ("x", "0", "65536", ""),
    "MASTER_ADDR": ("",),
    "SLURM_PROCID": ("a", "8"),
    "SLURM_STEP_NUM_TASKS": ("x",),
    "SLURM_LOCALID": ("?",),
    "SLURM_JOB_ID": ("1e3",),
    "SLURM_STEP_ID": ("batch",),
    "SLURM_CPUS_ON_NODE": ("x",),
    "SLURM_CPUS_PER_TASK": ("all",),
    "OMP_NUM_THREADS": ("abc", "0", "-4"),
    "CUDA_VISIBLE_DEVICES": ("abc", "0,0", "0;1"),
    "SSLX_GIVE_UP_S": ("abc", "nan", "-5"),
    "SSLX_JOIN_S": ("soon",),
    "SSLX_STALL_S": ("0",),
}
"""Of a task of Slurm or of torchrun, whose other variables are right."""
CASES = [({**(SLURM_TASK if "SLURM" in name else TORCHRUN), name: v}, name) for name in BROKEN for v in BROKEN[name]]
LACKING = [
    ({"RANK": "0"}, "WORLD_SIZE"),
    ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "x"}, "SLURM_NTASKS"),
]


@pytest.mark.parametrize(("environ", "name"), [*CASES, *LACKING])
def test_what_cannot_be_is_refused_by_its_name_in_one_line(environ: dict[str, str], name: str):
    with pytest.raises(ConfigError) as caught:
        environment.check(environ)
    assert re.match(rf"expected {name} (to be|beside) .*: .+", str(caught.value))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "environ",
    [
        {},
        TORCHRUN,
        SLURM_TASK,
        {"OMP_NUM_THREADS": "8", "CUDA_VISIBLE_DEVICES": "", "SSLX_GIVE_UP_S": "inf"},
        {"OMP_NUM_THREADS": "4,2", "CUDA_VISIBLE_DEVICES": "0, 3", "SSLX_GIVE_UP_S": "2.5"},
        {"OMP_NUM_THREADS": "", "CUDA_VISIBLE_DEVICES": "GPU-8932f937-d72c,MIG-b1/2/0"},
        {"CUDA_VISIBLE_DEVICES": "-1"},
        {"CUDA_VISIBLE_DEVICES": "NoDevFiles"},  # Slurm's, for a job without GPUs
        {"WORLD_SIZE": "nonsense"},  # without RANK it says nothing to anyone
    ],
)
def test_what_can_be_is_taken_and_left_as_it_is(environ: dict[str, str]):
    before = dict(environ)
    environment.check(environ)
    assert environ == before


def test_a_command_says_it_before_it_imports_anything_heavy(tmp_path: Path):
    code = (
        "import sys\nfrom sslx.__main__ import main\ncode = main(['pretrain'])\n"
        "print(code, *{'torch', 'numpy', 'tyro'} & set(sys.modules))"
    )
    for name, value in (("RANK", "x"), ("OMP_NUM_THREADS", "abc")):
        done = python("-c", code, cwd=tmp_path, without=("SLURM",), **dict[str, Any]({name: value}))
        assert done.stdout == "64\n"
        is_one_line(done.stderr, name)
