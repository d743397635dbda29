"""The linear probe by stochastic gradient descent, with the schedule of papers and a sweep of its settings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sslx import rng
from sslx.probe.features import Features, Progress, no_progress
from sslx.probe.linear import held_out_mask, predict, standardize

NUM_EPOCHS = 100
MOMENTUM = 0.9
LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Peak learning rates to try, for a batch of 256; they are scaled in proportion to the batch size."""
BATCH_SIZES = (256, 1024)


@dataclass(frozen=True)
class Score:
    """The accuracy on the test split, in [0, 1], and the settings that held-out training images chose."""

    accuracy: float
    lr: float
    batch_size: int


def score(
    train: Features,
    test: Features,
    num_classes: int,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Progress = no_progress,
) -> Score:
    """Train a linear classifier by SGD with each setting, and test the one that is best on held-out training images.

    MoCo (arXiv 1911.05722, section 4.1) trains for 100 epochs with batches of 256, momentum 0.9 and no weight decay;
    DINO (arXiv 2104.14294, appendix) does so with a cosine schedule to 0 and learning rates in proportion to the batch
    size, of which it takes the best of several.  So does this, with 14 settings of ``LEARNING_RATES`` and
    ``BATCH_SIZES``, and tests once.  Deviations: the features are frozen in one view of each image, without crops and
    flips; they are standardized by the training split, like those of MAE's probe (arXiv 2111.06377, appendix A), so
    that the learning rates suit any encoder; and the choice is made on a stratified tenth of the training split, after
    which the chosen setting trains on all of it.  Of equals, the smallest batch and learning rate is chosen.
    Raises DataError if no class has two training samples.
    """
    assert train.label is not None
    assert test.label is not None
    x, mean, std = standardize(train.x.to(device))
    label, held_out = train.label.to(device), held_out_mask(train.label, seed).to(device)
    best = Score(-1.0, LEARNING_RATES[0], BATCH_SIZES[0])
    num_fits = len(BATCH_SIZES) + 1
    for i, batch_size in enumerate(BATCH_SIZES):
        weights = fit(
            x[~held_out], label[~held_out], num_classes, LEARNING_RATES, batch_size, seed,
            progress=lambda what, done, total, i=i: progress(what, i * total + done, num_fits * total),
        )  # fmt: skip
        for lr, weight in zip(LEARNING_RATES, weights, strict=True):
            accuracy = float((predict(x[held_out], weight) == label[held_out]).double().mean())
            if accuracy > best.accuracy:
                best = Score(accuracy, lr, batch_size)
    (weight,) = fit(
        x, label, num_classes, [best.lr], best.batch_size, seed,
        progress=lambda what, done, total: progress(what, (num_fits - 1) * total + done, num_fits * total),
    )  # fmt: skip
    predicted = predict((test.x.to(device) - mean) / std, weight).cpu()
    return Score(float((predicted == test.label).double().mean()), best.lr, best.batch_size)


def fit(
    x: Tensor,
    label: Tensor,
    num_classes: int,
    lrs: Sequence[float],
    batch_size: int,
    seed: int = 0,
    *,
    num_epochs: int = NUM_EPOCHS,
    progress: Progress = no_progress,
) -> Tensor:
    """Return the weights (L, D + 1, num_classes) of one classifier per learning rate, whose last row is the bias.

    x: (N, D), standardized.  label: (N,) int64.  lrs: peak learning rates for a batch of 256.  All classifiers start
    from zeros, see the same batches and learn at once, in one matrix product per batch; the order of the samples
    depends on the seed and the epoch.  The last, smaller batch of an epoch is left out, and a batch is at most N.
    """
    batch_size = min(batch_size, len(x))
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    weight = x.new_zeros(x.shape[1], len(lrs), num_classes)
    momentum = torch.zeros_like(weight)
    peak = x.new_tensor(lrs)[:, None] * batch_size / 256
    steps_per_epoch = len(x) // batch_size
    for epoch in range(num_epochs):
        order = torch.from_numpy(rng.permutation(seed, "linear probe by SGD", epoch, size=len(x))).to(x.device)
        for step in range(steps_per_epoch):
            rows = order[step * batch_size : (step + 1) * batch_size]
            batch = x[rows]
            error = (batch @ weight.flatten(1)).view(batch_size, len(lrs), num_classes).softmax(-1)
            error[torch.arange(batch_size, device=x.device), :, label[rows]] -= 1
            gradient = (error.flatten(1).T @ batch).T.reshape(weight.shape) / batch_size
            momentum.mul_(MOMENTUM).add_(gradient)
            share = (epoch * steps_per_epoch + step) / (num_epochs * steps_per_epoch)
            weight -= peak * (0.5 * (1 + math.cos(math.pi * share))) * momentum
        progress("linear by SGD", epoch + 1, num_epochs)
    return weight.transpose(0, 1)
