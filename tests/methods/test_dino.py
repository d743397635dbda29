"""DINO: its views and head, the loss against loops, the center at any world size, and what its teacher sees."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kit import full_batch, tiny
from kit.full_batch import RunOnRanks
from sslx import cli, distributed, encoders, trained
from sslx.data.views import Augment
from sslx.losses import self_distillation
from sslx.methods import dino
from sslx.methods.base import Embedded
from sslx.runs import checkpoint
from sslx.train.step import cached_step, train_step

K = 10
VIEW = torch.ones(4, 3)


def make(trunk: encoders.Config | None = None, **options: Any) -> dino.Method:
    """In fp64; without a real encoder, for what looks at embeddings only, unless one is given."""
    numbers: dict[str, Any] = {"hidden_dim": 24, "bottleneck_dim": 12, "output_dim": K, "num_local": 3, **options}
    config = dino.Config(**numbers)
    return (config.build(tiny.identity()) if trunk is None else tiny.build(config, trunk)).double()


def logits(generator: torch.Generator, num_views: int = 5, size: int = 4) -> Embedded:
    """Of the student's views and of the teacher's two: (size, K) each, in fp64."""
    views = torch.randn(num_views + 2, size, K, generator=generator, dtype=torch.float64).unbind()
    return Embedded(views[:-2], views[-2:])


def test_local_views_keep_the_papers_share_of_the_size():
    for size, local in {224: 96, 96: 40, 32: 16, 16: 8, 8: 8}.items():
        assert [spec.size for spec in dino.Config(num_local=2).local_views(Augment(), size)] == [local] * 2
        assert [spec.size for spec in dino.Config(num_local=1, local_size=24).local_views(Augment(), size)] == [24]


def test_the_head_is_the_papers(generator: torch.Generator):
    """Three layers with GELU, length 1, prototypes of length 1 without bias."""
    head = make().head
    assert [type(layer) for layer in head.mlp] == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    assert [tuple(p.shape) for p in head.parameters() if p.ndim > 1] == [(24, 16), (24, 24), (12, 24), (K, 12)]
    assert head.prototypes.bias is None
    assert all(layer.bias.abs().max() == 0 for layer in head.mlp if isinstance(layer, nn.Linear))
    x = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    z, found = head.mlp(x), head(x)
    for i in range(5):
        for j, prototype in enumerate(head.prototypes.weight):
            cosine = (z[i] @ prototype) / (z[i].norm() * prototype.norm())
            assert found[i, j].item() == pytest.approx(cosine.item(), abs=1e-12)
    with torch.no_grad():
        head.prototypes.weight *= 0.1  # as weight decay does
    torch.testing.assert_close(head(x), found)


def test_the_head_has_batch_norm_if_so_asked():
    head = make(head_norm=True).head
    block = [nn.Linear, nn.BatchNorm1d, nn.GELU]
    assert [type(layer) for layer in head.mlp] == [*block, *block, nn.Linear]
    assert [layer.bias is None for layer in head.mlp if isinstance(layer, nn.Linear)] == [True, True, False]


def test_the_heads_cosines_are_in_fp32_in_autocast_too(generator: torch.Generator):
    method = make().float()
    with torch.autocast("cpu", torch.bfloat16):
        cosines = method.head(torch.randn(5, 16, generator=generator))
    assert cosines.dtype == torch.float32
    assert (cosines - cosines.bfloat16()).abs().max() > 0


def distribution(scores: Sequence[Tensor], temperature: float, center: Sequence[float] | None = None) -> list[Tensor]:
    """Softmax of one sample's logits, less the center's, each a scalar tensor."""
    exponentials = [((x - c) / temperature).exp() for x, c in zip(scores, center or [0.0] * len(scores), strict=True)]
    return [e / sum(exponentials) for e in exponentials]


def by_loops(student: Sequence[Tensor], teacher: Sequence[Sequence[Sequence[Any]]], temperature: float) -> Tensor:
    """Equation 3, pair by pair and sample by sample, divided by the number of both."""
    terms: list[Tensor] = []
    for t, targets in enumerate(teacher):
        for v, view in enumerate(student):
            for target, sample in zip(targets, view, strict=True):
                predicted = distribution(sample.unbind(), temperature)
                if v != t:
                    terms.append(-sum((p * q.log() for p, q in zip(target, predicted, strict=True)), torch.zeros(())))
    return torch.stack(terms).mean()


@pytest.mark.parametrize(("num_teacher", "num_views"), [(2, 2), (2, 4), (1, 3), (3, 3)])
def test_self_distillation_is_the_mean_over_pairs_of_different_views(
    num_teacher: int, num_views: int, generator: torch.Generator
):
    student = torch.randn(num_views, 3, K, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.rand(num_teacher, 3, K, generator=generator, dtype=torch.float64).softmax(-1).requires_grad_()
    loss = self_distillation(student.unbind(), teacher.unbind(), 0.3)
    expected = by_loops(student.unbind(), teacher.detach().tolist(), 0.3)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    gradient, none = torch.autograd.grad(loss, (student, teacher), allow_unused=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0], rtol=1e-10, atol=1e-13)
    assert none is None


def loss_of(*z: Tensor) -> Tensor:
    """Of two student's views, given the teacher's."""
    return self_distillation(z[:2], z[2:], 0.3)


def oracle(*z: Tensor) -> Tensor:
    return by_loops(z[:2], [view.tolist() for view in z[2:]], 0.3)


@full_batch.over_ranks
def test_ranks_give_the_full_batch_loss_and_gradient(world_size: int, ranks: RunOnRanks, generator: torch.Generator):
    inputs = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64).unbind()
    teacher = torch.randn(2, 6, K, generator=generator, dtype=torch.float64).softmax(-1).unbind()
    weight = torch.randn(4, K, generator=generator, dtype=torch.float64)
    full_batch.check(ranks, world_size, loss_of, oracle, inputs, weight, given=teacher)


def test_self_distillation_is_in_fp32_in_autocast_too(generator: torch.Generator):
    student = torch.randn(3, 8, 64, generator=generator).bfloat16()
    teacher = torch.randn(2, 8, 64, generator=generator).softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = self_distillation(student.unbind(), teacher.unbind(), 0.1)
    assert loss.dtype == torch.float32
    expected = self_distillation(student.double().unbind(), teacher.double().unbind(), 0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "temperature", "what"),
    [
        ([VIEW], [VIEW], 0.1, r"2 views or more.* got 1 and 1$"),
        ([VIEW] * 2, [], 0.1, r"got 2 and 0$"),
        ([VIEW] * 2, [VIEW] * 3, 0.1, r"got 2 and 3$"),
        ([VIEW] * 2, [VIEW[:, :2]], 0.1, r"one shape \(B, K\), got \(4, 3\), \(4, 3\), \(4, 2\)$"),
        ([VIEW[:, 0]] * 2, [VIEW[:, 0]], 0.1, r"one shape \(B, K\)"),
        ([VIEW.long()] * 2, [VIEW.long()] * 2, 0.1, "expected"),
        ([VIEW] * 2, [VIEW] * 2, 0.0, "expected"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(student: Any, teacher: Any, temperature: float, what: str):
    with pytest.raises(ValueError, match=what) as raised:
        self_distillation(student, teacher, temperature)
    assert "\n" not in str(raised.value)


def test_the_loss_is_that_of_the_centered_and_sharpened_teacher(generator: torch.Generator):
    method, embedded = tiny.at(make(student_temperature=0.5), 0.15), logits(generator)
    center = torch.randn(1, K, generator=generator, dtype=torch.float64)
    method.center.copy_(center)
    step = method.loss(embedded)  # half-way from 0.04 to 0.07
    teacher = [[distribution(row.unbind(), 0.055, center[0].tolist()) for row in view] for view in embedded.given]
    assert step.loss.item() == pytest.approx(by_loops(embedded.compared, teacher, 0.5).item(), rel=1e-10)


@pytest.mark.parametrize(
    ("progress", "options", "expected"),
    [
        (0.0, {}, 0.04),
        (0.1, {}, 0.05),
        (0.3, {}, 0.07),
        (0.9, {}, 0.07),
        (0.0, {"teacher_warmup": 0.0}, 0.07),
        (1.0, {"teacher_warmup": 1.0, "teacher_temperature": 0.02}, 0.02),
    ],
)
def test_the_teachers_temperature_rises_in_a_line(
    progress: float, options: dict[str, Any], expected: float, generator: torch.Generator
):
    step = tiny.at(make(**options), progress).loss(logits(generator))
    assert step.metrics["teacher_temperature"].item() == pytest.approx(expected, abs=1e-8)


def centers(steps: Sequence[Tensor], weight: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Each step's center, and the mean over ranks of the gradient of a factor, where each rank has a share."""
    world_size, rank = distributed.world_size(), distributed.rank()
    method, found, gradients = tiny.at(make(), 0.5), list[Tensor](), list[Tensor]()
    for inputs in steps:
        leaf = weight.clone().requires_grad_()
        *student, t1, t2 = (z.chunk(world_size)[rank] for z in inputs)
        loss = method.loss(Embedded(tuple(z * leaf for z in student), (t1, t2))).loss
        found.append(method.center.clone())
        gradients.append(distributed.mean_over_ranks(torch.autograd.grad(loss, leaf)[0]))
    return found, gradients


@full_batch.over_ranks
def test_the_center_is_the_moving_average_over_all_ranks(
    world_size: int, ranks: RunOnRanks, generator: torch.Generator
):
    steps = [torch.stack(sum(logits(generator, num_views=3, size=6), ())) for _ in range(3)]
    weight = torch.rand(K, generator=generator, dtype=torch.float64)
    answers = ranks(world_size, centers, steps, weight)
    center: list[float] = []
    for number, inputs in enumerate(steps):
        leaf = weight.clone().requires_grad_()
        rows = [row for view in inputs[-2:].tolist() for row in view]
        mean = [sum(row[k] for row in rows) / len(rows) for k in range(K)]
        center = center or mean  # at the first step
        teacher = [[distribution(row.unbind(), 0.07, center) for row in view] for view in inputs[-2:]]
        (expected,) = torch.autograd.grad(by_loops([z * leaf for z in inputs[:-2]], teacher, 0.1), leaf)
        center = [0.9 * c + 0.1 * m for c, m in zip(center, mean, strict=True)]
        for found, gradients in answers:
            torch.testing.assert_close(found[number][0], torch.tensor(center, dtype=torch.float64), rtol=0, atol=1e-12)
            assert (gradients[number] - expected).norm() < 1e-10 * expected.norm()


@pytest.mark.parametrize("trunk", [tiny.RESNET, tiny.VIT])
def test_the_teacher_sees_global_views_only(trunk: encoders.Config, generator: torch.Generator):
    method = make(trunk)
    images = tiny.batch(method, generator)
    tiny.move_randomly(method.teacher.parameters(), generator)
    method.eval()  # by running statistics, so that a view alone gives what it gives beside the others
    others = replace(images, views=(*images.views[:2], *tiny.batch(method, generator).views[2:]))
    student, teacher = method.embed(images)
    changed, same = method.embed(others)
    assert (len(student), teacher[0].shape) == (5, (6, K))
    torch.testing.assert_close(teacher, same, rtol=0, atol=0)
    for v, view in enumerate(images.views):
        torch.testing.assert_close(student[v], method.head(method.encoder(view)))
        assert torch.allclose(student[v], changed[v]) == (v < 2)
    for view, t in zip(images.views, teacher, strict=False):
        torch.testing.assert_close(t, method.teacher.head(method.teacher.encoder(view)))
        assert (t - method.head(method.encoder(view))).abs().max() > 1e-3


def test_prototypes_stay_as_they_are_at_first(generator: torch.Generator):
    method = make(tiny.RESNET, freeze_last=0.25)
    images = tiny.batch(method, generator)
    for progress, frozen in ((0.0, True), (0.2, True), (0.25, False), (0.9, False), (0.1, True)):
        method.zero_grad()
        tiny.at(method, progress)(images).loss.backward()
        gradient = method.head.prototypes.weight.grad
        assert gradient is not None, "DDP would wait for it"
        assert (gradient.abs().max() == 0) == frozen
        others = [p.grad for part in (method.encoder, method.head.mlp) for p in part.parameters()]
        assert all(g is not None and g.isfinite().all() for g in others)
        assert sum(g.abs().sum() for g in others if g is not None) > 0


@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_gradient_caching_gives_the_whole_batchs_gradient_and_center(progress: float, generator: torch.Generator):
    """On a ViT, which has no batch norm (but timm's interpolation of position embeddings, in fp32)."""
    images, found = tiny.batch(make(tiny.VIT), generator), list[tuple[list[Tensor | None], Tensor]]()
    parts = [tiny.part(images, rows) for rows in (slice(2), slice(2, 6))]
    for step, batches in ((train_step, [images]), (cached_step, parts)):
        method = make(tiny.VIT)
        step(method, batches, torch.optim.SGD(method.parameters(), 0.0, fused=True), progress, None)
        found.append(([p.grad for p in method.parameters()], method.center))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def test_entropies_tell_both_collapses(generator: torch.Generator):
    """All samples on one prototype, all on all alike, and each on its own."""
    student, one = logits(generator, size=K).compared, torch.zeros(K, K, dtype=torch.float64)
    one[:, 0] = 10
    own = 10 * torch.eye(K, dtype=torch.float64)
    for teacher, expected in ((one, (0, 0)), (torch.zeros_like(one), (1, 1)), (own, (0, 1))):
        method = make()
        method.center.fill_(1)  # there is one, and it is no prototype's
        metrics = method.loss(Embedded(student, (teacher, teacher))).metrics
        found = metrics["teacher_entropy"].item(), metrics["prototype_entropy"].item()
        assert found == pytest.approx(expected, abs=1e-4)


def test_std_is_of_the_students_views(generator: torch.Generator):
    student, teacher = logits(generator, size=256)
    same = tuple(z[:1].expand_as(z) for z in student)
    assert make().loss(Embedded(student, teacher)).metrics["logit_std"] == pytest.approx(1, abs=0.1)
    assert make().loss(Embedded(same, teacher)).metrics["logit_std"] < 1e-3


@pytest.mark.slow
def test_health_and_probes_look_at_the_teacher_and_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = "--source.name digits --data.size 8 --data.threads 0 --method.name dino --batch-size 32 --steps 2 --name r"
    flags += " --encoder.layers 1 1 1 1 --encoder.channels 8 8 8 16 --method.output-dim 8 --method.hidden-dim 8"
    flags += " --device cpu --precision fp32 --optim.lr 1 --optim.warmup 0 --online.every 0 --health.every 0"
    assert cli.main(["pretrain", *flags.split(), "--runs", str(tmp_path)]) == 0
    assert "health and probes look at the features of the teacher's encoder" in capsys.readouterr().out
    state = checkpoint.load(tmp_path / "r")["method"]
    encoder = trained.load(tmp_path / "r").encoder.state_dict()
    torch.testing.assert_close(encoder, {key: state[f"teacher.encoder.{key}"] for key in encoder}, rtol=0, atol=0)
    assert any(not torch.equal(value, state[f"encoder.{key}"]) for key, value in encoder.items())
    config = encoders.Config(layers=(1, 1, 1, 1), channels=(8, 8, 8, 16), weights=str(tmp_path / "r"))
    torch.testing.assert_close(encoders.build(config, 8).state_dict(), encoder, rtol=0, atol=0)
    assert cli.main(["probe", str(tmp_path / "r"), "--no-baselines", "--probe.num-draws", "2"]) == 0
    assert "the pretrained encoder is the teacher's encoder" in capsys.readouterr().out
