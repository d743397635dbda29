"""The linear probe by SGD against torch's own optimizer and schedule, and its choice of settings."""

import pytest
import torch
from torch.nn import functional as F

from kit.digits import TEST, TEST_LABEL, TRAIN, TRAIN_LABEL
from sslx import rng
from sslx.errors import DataError
from sslx.probe import linear, sgd
from sslx.probe.features import Features


def test_fit_is_torchs_sgd_with_momentum_and_cosine(generator: torch.Generator) -> None:
    x, label = torch.randn(70, 6, generator=generator), torch.randint(0, 3, (70,), generator=generator)
    lrs, num_epochs, steps_per_epoch = (0.05, 0.4), 4, 70 // 16
    weights = sgd.fit(x, label, 3, lrs, 16, seed=9, num_epochs=num_epochs)
    for lr, weight in zip(lrs, weights, strict=True):
        head = torch.nn.Linear(6, 3)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        optimizer = torch.optim.SGD(head.parameters(), lr=lr * 16 / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_epochs * steps_per_epoch)
        for epoch in range(num_epochs):
            order = torch.from_numpy(rng.permutation(9, "linear probe by SGD", epoch, size=70))
            for rows in order[: 16 * steps_per_epoch].split(16):
                optimizer.zero_grad()
                F.cross_entropy(head(x[rows]), label[rows]).backward()
                optimizer.step()
                schedule.step()
        torch.testing.assert_close(weight, torch.cat([head.weight.T, head.bias[None]]).detach(), rtol=1e-4, atol=1e-6)


def test_it_is_as_good_as_logistic_regression_and_reads_the_test_split_once() -> None:
    calls: list[tuple[str, int, int]] = []
    train = Features(TRAIN.x[:600], TRAIN_LABEL[:600], TRAIN.index[:600])
    score = sgd.score(train, TEST, 10, seed=3, progress=lambda *call: calls.append(call))
    assert calls == [("linear by SGD", i + 1, 300) for i in range(300)]
    assert score.accuracy == pytest.approx(linear.accuracy(train, TEST, 10)[0], abs=0.04)
    assert score.lr in sgd.LEARNING_RATES
    assert score.batch_size in sgd.BATCH_SIZES
    other = sgd.score(train, Features(TEST.x.flip(0) * 7 - 3, (TEST_LABEL + 1) % 10, TEST.index), 10, seed=3)
    assert (other.lr, other.batch_size) == (score.lr, score.batch_size), "chosen without the test split"
    assert other.accuracy < 0.5
    x, mean, std = linear.standardize(train.x)
    (weight,) = sgd.fit(x, TRAIN_LABEL[:600], 10, [score.lr], score.batch_size, 3)
    again = (linear.predict((TEST.x - mean) / std, weight) == TEST_LABEL).double().mean()
    assert float(again) == score.accuracy


def test_one_sample_a_class_leaves_nothing_to_choose_on() -> None:
    few = Features(torch.eye(3), torch.arange(3), torch.arange(3))
    with pytest.raises(DataError, match="2 or more training samples of a class"):
        sgd.score(few, few, 3)
