"""Moving averages: every parameter follows its own, by the definition, in every method; states with old names load."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kit import tiny
from sslx import optim
from sslx.encoders import state_dicts
from sslx.methods import ema
from sslx.methods.base import Method
from sslx.train.step import train_step

AVERAGES = {"byol": ("target", "projector"), "mocov3": ("target", "projector"), "dino": ("teacher", "head")}
"""Method -> the names of its average and of the head in it."""
every_method = pytest.mark.parametrize("name", AVERAGES)


def networks(generator: torch.Generator) -> tuple[ema.Average, nn.Module]:
    """An average of other weights, and the two parts that it follows."""
    encoder: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    online = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(4, 5)})
    average = ema.Average(encoder, head=online["head"], base=0.9)
    tiny.move_randomly(average.parameters(), generator)
    return average, online


def make(name: str) -> tuple[Method, ema.Average, list[Tensor]]:
    """A method in fp64, its average, and the parameters that this follows."""
    method, (average, head) = tiny.narrowed(name, "resnet").double(), AVERAGES[name]
    return method, getattr(method, average), [*method.encoder.parameters(), *getattr(method, head).parameters()]


@pytest.mark.parametrize(("progress", "expected"), [(0.0, 0.996), (0.5, 0.998), (1.0, 1.0)])
def test_the_momentum_rises_to_one(progress: float, expected: float):
    average = ema.Average(tiny.identity(), base=0.996)
    for dtype, error in ((torch.float64, 1e-12), (torch.float32, 1e-7)):
        assert average.momentum(torch.tensor(progress, dtype=dtype)).item() == pytest.approx(expected, abs=error)


def test_each_parameter_follows_its_own_and_buffers_stay(generator: torch.Generator) -> None:
    average, online = networks(generator)
    progress, momentum = torch.tensor(0.5), 1 - torch.tensor(0.1) * 0.5
    buffers = copy.deepcopy(list(average.buffers()))
    for _ in range(3):
        before = [p.clone() for p in average.parameters()]
        average.follow(progress)
        for old, new, ahead in zip(before, average.parameters(), online.parameters(), strict=True):
            torch.testing.assert_close(new, momentum * old + (1 - momentum) * ahead)
        with torch.no_grad():
            for parameter in online["head"].parameters():
                parameter.add_(1.0)
    assert all(map(torch.equal, buffers, average.buffers()))


def test_equal_weights_stay_equal_and_at_the_end_nothing_moves(generator: torch.Generator) -> None:
    average, online = networks(generator)
    still = copy.deepcopy(list(average.parameters()))
    average.follow(torch.ones(()))
    assert all(map(torch.equal, average.parameters(), still))
    average.load_state_dict(online.state_dict())
    average.follow(torch.rand((), generator=generator))
    assert all(map(torch.equal, average.parameters(), online.parameters()))


def test_it_goes_on_with_other_parameters_and_in_a_copy(generator: torch.Generator) -> None:
    """As after a move that makes new ones, and in a method that is copied."""
    average, online = networks(generator)
    average.base, at_once = 0.0, torch.zeros(())
    average.follow(torch.ones(()))
    other, its_online = copy.deepcopy((average, online))
    for module in (average, online):
        for layer in module.modules():
            for name, parameter in list(layer.named_parameters(recurse=False)):
                setattr(layer, name, nn.Parameter(parameter.detach().double(), requires_grad=parameter.requires_grad))
    average.follow(at_once)
    assert all(map(torch.equal, average.parameters(), online.parameters()))
    assert not any(torch.allclose(a, b) for a, b in zip(other.parameters(), its_online.parameters(), strict=True))
    other.follow(at_once)
    for a, b in zip(other.parameters(), its_online.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@every_method
def test_it_starts_as_the_online_network_in_memory_of_its_own(name: str):
    _, average, online = make(name)
    assert all(map(torch.equal, average.parameters(), online))
    assert not {p.data_ptr() for p in average.parameters()} & {p.data_ptr() for p in online}


@every_method
@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
def test_it_gets_no_gradient_and_follows_after_the_optimizer(name: str, optimizer: Any, generator: torch.Generator):
    method, average, online = make(name)
    before = copy.deepcopy(list(average.parameters()))
    progress = torch.rand((), generator=generator).item()
    stepped = optim.build(optim.Config(name=optimizer, lr=0.1), method)
    assert not {id(p) for group in stepped.param_groups for p in group["params"]} & set(map(id, average.parameters()))
    train_step(method, [tiny.batch(method, generator)], stepped, progress, None)
    assert all(p.grad is None and not p.requires_grad for p in average.parameters())
    momentum = 1 - (1 - average.base) * (math.cos(math.pi * progress) + 1) / 2
    for new, old, ahead in zip(average.parameters(), before, online, strict=True):
        torch.testing.assert_close(new, momentum * old + (1 - momentum) * ahead.detach(), rtol=0, atol=1e-14)
    assert not all(map(torch.equal, average.parameters(), before))


@pytest.mark.parametrize("name", ["byol", "mocov3"])
def test_predictions_are_of_the_online_network_and_targets_of_the_average(name: str, generator: torch.Generator):
    method: Any = tiny.narrowed(name, "resnet").double()
    images = tiny.batch(method, generator)
    tiny.move_randomly(method.target.parameters(), generator)
    method.eval()  # by running statistics, so that a view alone gives what it gives beside the other
    for view, prediction, target in zip(images.views, *method.embed(images), strict=True):
        projection = method.projector(method.encoder(view))
        torch.testing.assert_close(prediction, method.predictor(projection))
        torch.testing.assert_close(target, method.target.projector(method.target.encoder(view)))
        assert (projection - target).abs().max() > 1e-3
        assert (prediction.requires_grad, target.requires_grad) == (True, False)


@every_method
def test_its_norms_keep_statistics_of_their_own(name: str, generator: torch.Generator):
    method, average, _ = make(name)
    tiny.move_randomly(average.parameters(), generator)
    method.embed(tiny.batch(method, generator))
    own, others = (
        {key: value for key, value in module.named_buffers() if key.endswith("running_mean")}
        for module in (average.encoder, method.encoder)
    )
    assert own.keys() == others.keys()
    assert not any(torch.equal(value, others[key]) for key, value in own.items())


@every_method
@pytest.mark.parametrize("strictly", [False, True])
def test_a_state_with_the_names_of_before_loads(name: str, strictly: bool, generator: torch.Generator):
    """In sslx 0.1, an average was a sequence: ``target.0`` and ``target.1``."""
    method, average, _ = make(name)
    attribute, head = AVERAGES[name]
    before = method.state_dict()
    state = {key: torch.randn(value.shape, generator=generator).to(value.dtype) for key, value in before.items()}
    sequence = {f"{attribute}.encoder.": f"{attribute}.0.", f"{attribute}.{head}.": f"{attribute}.1."}
    old = dict(state)
    for new_name, old_name in sequence.items():
        for key in [key for key in old if key.startswith(new_name)]:
            old[old_name + key.removeprefix(new_name)] = old.pop(key)
    assert old.keys() != state.keys()
    assert len(list(average.state_dict())) == sum(key.startswith(tuple(sequence.values())) for key in old)
    unchanged = dict(old)
    if strictly:
        state_dicts.load(method, old, "the checkpoint")
    else:
        method.load_state_dict(old)
    assert old == unchanged
    torch.testing.assert_close(method.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("name", tiny.CASES, ids=" ".join)
def test_exported_is_the_teacher_of_dino_and_the_online_encoder_of_all_others(name: tuple[str, str]):
    method = tiny.narrowed(*name)
    assert method.exported is (method.teacher.encoder if name[0] == "dino" else method.encoder)
    assert method.config.exported_name == ("the teacher's encoder" if name[0] == "dino" else "")


def test_the_encoders_average_has_its_statistics_too_and_stays_where_a_step_was_not_taken(
    generator: torch.Generator,
) -> None:
    """Against the definition in fp64, with the momentum of its first steps, which is smaller."""
    method = tiny.narrowed("simclr", "resnet")
    method.keep_average(0.6)
    method.double()
    kept = method.encoder_average
    assert kept is not None
    optimizer = optim.build(optim.Config(name="sgd", lr=0.5), method)
    truth = {name: tensor.clone() for name, tensor in method.encoder.state_dict().items()}
    for taken, share in ((True, 1 / 10), (True, 2 / 11), (False, 1.0), (True, 3 / 12), (True, 4 / 13)):
        images = tiny.batch(method, generator)
        if not taken:
            images.views[0][0, 0, 0, 0] = math.inf
        train_step(method, [images], optimizer, 0.5, None)
        for name, tensor in method.encoder.state_dict().items():
            truth[name] = share * truth[name] + (1 - share) * tensor if tensor.is_floating_point() else tensor.clone()
    averaged = kept.encoder.state_dict()
    assert averaged.keys() == truth.keys()
    for name, tensor in truth.items():
        torch.testing.assert_close(averaged[name], tensor, rtol=1e-12, atol=1e-12)
    kept.num_steps.fill_(1e6)
    assert kept.momentum(torch.tensor(0.5)).item() == pytest.approx(0.6)
    assert not any(parameter.requires_grad for parameter in kept.parameters())
    assert method.exported is method.encoder
