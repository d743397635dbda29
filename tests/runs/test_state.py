"""Checkpoints whose digest is right and whose content sslx did not write: one line each, in every command."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kit.checkpoints import State, forge
from kit.processes import is_one_line, pretrain
from kit.runs import Run
from sslx import cli
from sslx.errors import DataError
from sslx.runs import checkpoint
from sslx.runs.state import RESUME, VIEW, check, not_finite
from sslx.trained import load

Altered = Callable[[Callable[[State], Any]], Path]
RUN = "--source.name digits --data.backend torchvision --data.threads 0 --checkpoint.every 1".split()
GONE = object()


def put(*path: Any, value: Any) -> Callable[[State], Any]:
    """What replaces one thing in a state, or deletes it."""

    def change(state: State) -> State:
        inner: Any = state
        for key in path[:-1]:
            inner = inner[key]
        if value is GONE:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        return state

    return change


def drop(*path: Any) -> Callable[[State], Any]:
    return put(*path, value=GONE)


FOR_ALL: dict[str, Callable[[State], Any]] = {
    "a list": lambda state: [state],
    "a tensor": lambda _: torch.zeros(3),
    "None": lambda _: None,
    "int keys": lambda state: dict(enumerate(state.values())),
    **{f"step {value}": put("step", value=value) for value in ("two", math.nan, 10**30, 1)},
    "no config": drop("config"),
    "config a list": put("config", value=[]),
    "no method": drop("method"),
    **{f"method {value}": put("method", value=value) for value in ([], {})},
    "method int keys": lambda state: state | {"method": dict(enumerate(state["method"].values()))},
    "method of numbers": lambda state: state | {"method": dict.fromkeys(state["method"], 1.0)},
    "size a string": put("size", value="16"),
}
FOR_RESUME: dict[str, Callable[[State], Any]] = {
    "no run_id": drop("run_id"),
    "no optimizer": drop("optimizer"),
    **{f"optimizer {value}": put("optimizer", value=value) for value in (None, {})},
    "groups of numbers": put("optimizer", "param_groups", value=[1, 2]),
    "params a string": put("optimizer", "param_groups", 0, "params", value="0"),
    "state by name": put("optimizer", "state", value={"a": {}}),
    "no loader": drop("loader"),
    "loader None": put("loader", value=None),
    **{f"position {value}": put("loader", "position", value=value) for value in (-1, math.nan)},
    "epoch huge": put("loader", "epoch", value=10**40),
    "seed a list": put("loader", "seed", value=[0]),
    "weights nan": put("method", "projector.0.weight", value=torch.full((8, 8), math.nan)),
}
FOR_VIEW: dict[str, Callable[[State], Any]] = {
    "no view": drop("eval_view"),
    "view a list": put("eval_view", value=[224]),
    "view of no size": drop("eval_view", "size"),
    "view's size huge": put("eval_view", "size", value=10**9),
    "view of another kind": put("eval_view", "scale", value=1),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("trained")
    assert cli.main(pretrain(folder, *RUN)) == 0
    return folder / "r"


@pytest.fixture
def altered(trained: Path) -> Altered:
    """Writes the run's checkpoint of step 2 with another content, of right digest, and gives its path."""

    def write(change: Callable[[State], Any]) -> Path:
        folder = trained / "checkpoints" / "step_2"
        folder.mkdir(exist_ok=True)
        forge(folder, 2, change(checkpoint.load(trained / "checkpoints" / "step_1") | {"step": 2}))
        return folder

    return write


@pytest.fixture
def here(trained: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(trained.parent, capfd)


@pytest.mark.parametrize("kind", [*FOR_ALL, *FOR_RESUME])
def test_a_restart_finds_the_good_one_before(altered: Altered, kind: str) -> None:
    path = altered((FOR_ALL | FOR_RESUME)[kind])
    good, (line,) = checkpoint.newest(path.parents[1], RESUME)
    assert good == path.with_name("step_1")
    assert line.isprintable()
    assert ("non-finite" if kind == "weights nan" else "not written by sslx") in line


@pytest.mark.parametrize("kind", ["a list", "weights nan"])
def test_a_restart_takes_the_good_one_before(altered: Altered, kind: str, here: Run) -> None:
    run = altered((FOR_ALL | FOR_RESUME)[kind]).parents[1]
    _, (line,) = checkpoint.newest(run, RESUME)
    assert here(*RUN, "--resume", "auto") == (0, "")
    assert line in here.out
    assert checkpoint.load(run, needs=RESUME)["step"] == 2


@pytest.mark.parametrize("kind", [*FOR_ALL, *FOR_VIEW])
def test_what_a_probe_cannot_read_is_refused_in_one_line(altered: Altered, kind: str) -> None:
    path = altered((FOR_ALL | FOR_VIEW)[kind])
    with pytest.raises(DataError, match=f"^checkpoint {path} was not written by sslx: ") as caught:
        load(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("command", ["probe", "plot"])
def test_the_commands_end_with_that_line(altered: Altered, command: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = altered(FOR_ALL["method []"])
    capfd.readouterr()
    assert cli.main([command, str(path)]) == 65
    is_one_line(capfd.readouterr().err, f"checkpoint {path} was not written by sslx: ")


@pytest.mark.parametrize(
    "change",
    [
        put("optimizer", "state", 0, value={"velocity": torch.zeros(3)}),
        put("optimizer", "state", 99, value={}),
        put("optimizer", "state", 0, "momentum_buffer", value=torch.zeros(5)),
        put("optimizer", "state", 0, "momentum_buffer", value="a"),
        put("optimizer", "param_groups", 0, "params", value=[7]),
        put("optimizer", "param_groups", value=[]),
    ],
)
def test_another_optimizers_state_is_refused(altered: Altered, change: Callable[[State], Any], here: Run) -> None:
    altered(change)
    code, err = here(*RUN, "--resume", "auto")
    assert code == 65
    is_one_line(err, "has the state of another optimizer")


@pytest.mark.parametrize("images", [None, [], {"digest": 1}, {"digest": "a", "paths": "b"}])
def test_images_that_sslx_did_not_note_are_refused(altered: Altered, images: object, here: Run) -> None:
    altered(put("loader", "images", value=images))
    code, err = here(*RUN, "--resume", "auto")
    assert code == 65
    is_one_line(err)


def test_settings_of_the_optimizer_are_the_configs(altered: Altered, here: Run) -> None:
    """Whatever stands in the checkpoint, also one of an sslx whose SGD was not the fused one."""

    def change(state: State) -> State:
        for group in state["optimizer"]["param_groups"]:
            group |= {"momentum": "a lot", "foreach": True, "fused": None, "lr": math.nan}
        return state

    run = altered(change).parents[1]
    (run / "config.json").write_text((run / "config.json").read_text().replace('"steps": 2', '"steps": 3'))
    assert here(*RUN, "--resume", "auto", "--steps", "3")[0] == 0
    groups = checkpoint.load(run / "checkpoints" / "step_3")["optimizer"]["param_groups"]
    assert [group["momentum"] for group in groups] == [0.9, 0.9]
    shutil.rmtree(run / "checkpoints" / "step_3")
    (run / "config.json").write_text((run / "config.json").read_text().replace('"steps": 3', '"steps": 2'))


def test_what_is_asked_for_is_what_is_checked() -> None:
    state: State = {"step": "a", "method": {"w": torch.ones(2)}, "config": "{}"}
    assert check(state, (), "it") is state
    assert check(state, ("method", "config"), "it") is state
    with pytest.raises(DataError, match=r"^it was not written by sslx: expected its 'step' to be .*, got 'a'"):
        check(state, VIEW, "it")


def test_not_finite_finds_it_anywhere_and_takes_the_large_for_finite() -> None:
    large = torch.full((1000,), 3e38)
    tree: State = {"a": [large, {"b": (torch.ones(2), torch.zeros(0), 1.0)}], "n": torch.tensor([1 << 60])}
    assert not_finite(tree) == []
    for value in (math.nan, math.inf, -math.inf):
        tree["a"][1]["b"][0][1] = value
        assert not_finite(tree, "state") == ["state.a.1.b.0"]
