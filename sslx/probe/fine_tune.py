"""Fine-tuning: the encoder and a linear classifier trained together on all labels or on a fraction of them."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslx import data, optim, parallel
from sslx.console.words import plural
from sslx.data.augment import Augment
from sslx.data.sources import Source
from sslx.data.views import ViewSpec
from sslx.distributed import Ranks
from sslx.encoders import Encoder, norms
from sslx.encoders.group_norm import has_batch_norm
from sslx.errors import ConfigError, DataError, NonFiniteError
from sslx.machine import devices
from sslx.optim.groups import Groups, layers_of, split
from sslx.probe import features, low_shot
from sslx.probe.config import Config
from sslx.probe.features import Features, Progress, no_progress
from sslx.probe.linear import held_out_mask

MIN_BATCH_SIZE = 8
"""Smallest batch, if there are as many labeled images; batch norm needs several."""
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a kind of encoder is fine-tuned.

    lrs: peak learning rates to choose from, of the last layers of the encoder and for a batch of 256.
    default_lr: the rate if too few labels leave nothing to choose it on.
    standardized: whether a batch norm without weights scales the features for the classifier.
    min_steps: without a minimum, 30 epochs of a dozen images would end before the encoder has moved.
    lr_scaling: whether the learning rate goes with the batch size or with its root.
    head_scale: factor on the learning rate of the classifier.
    """

    optimizer: Literal["sgd", "adamw"]
    paper: str
    lrs: tuple[float, ...]
    default_lr: float
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    head_scale: float = 1.0
    standardized: bool = False
    layer_decay: float = 1.0
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    warmup: float = 0.1
    num_epochs: int = 30
    min_steps: int = 200
    batch_size: int = 256

    def words(self) -> str:
        """Return the recipe in one line, for tables and for probe.json."""
        parts = [
            f"{'SGD' if self.optimizer == 'sgd' else 'AdamW'} as in {self.paper}",
            f"{plural(self.num_epochs, 'epoch')}, at least {self.min_steps} steps",
            f"batch {self.batch_size} or a quarter of the labels",
            f"learning rate for a batch of 256 {self._rates()}",
            f"{self.head_scale:g} times it for the classifier" if self.head_scale != 1 else "",
            f"layer decay {self.layer_decay:g}" if self.layer_decay != 1 else "",
            f"weight decay {self.weight_decay:g}",
            f"label smoothing {self.label_smoothing:g}" if self.label_smoothing else "",
            f"{100 * self.warmup:g} % warm-up, cosine",
            "random crops and flips",
            "batch norm before the classifier" if self.standardized else "",
        ]
        return "; ".join(filter(None, parts))

    def _rates(self) -> str:
        scaling = "in proportion to it" if self.lr_scaling == "linear" else "in proportion to its root"
        if len(self.lrs) == 1:
            return f"{self.lrs[0]:g}, {scaling}"
        rates = ", ".join(f"{lr:g}" for lr in self.lrs[:-1])
        return f"{rates} or {self.lrs[-1]:g}, as a tenth of the labeled images chooses, {scaling}"

    def optim(self, lr: float) -> optim.Config:
        """Return the settings of the optimizer for a peak learning rate of a batch of 256."""
        scaled = lr / 16 if self.lr_scaling == "sqrt" else lr  # which optim multiplies by the root of the batch size
        return optim.Config(
            name=self.optimizer, lr=scaled, lr_scaling=self.lr_scaling, weight_decay=self.weight_decay,
            warmup=self.warmup,
        )  # fmt: skip

    def fitted(self, num_labels: int, num_ranks: int) -> tuple[int, int]:
        """Return the global batch size and the number of steps for this number of labeled images.

        The batch is a power of two, so that 1, 2, 4, ... ranks take the same steps; other numbers of ranks take a
        little less.  Raises DataError if not every rank gets an image.
        """
        limit = min(self.batch_size, num_labels, max(MIN_BATCH_SIZE, num_labels // 4))
        batch_size = (1 << (limit.bit_length() - 1)) // num_ranks * num_ranks
        if not batch_size:
            raise DataError(
                f"expected a labeled image for each of {num_ranks} ranks to fine-tune on, got {num_labels}: "
                "use fewer ranks, or a larger --probe.fine-tune"
            )
        return batch_size, max(self.min_steps, self.num_epochs * (num_labels // batch_size))


@dataclass(frozen=True)
class Score:
    """The accuracy on the test split, in [0, 1], after fine-tuning, and how it was reached.

    mean, std: over ``num_draws`` draws of ``num_labels`` labeled images.  lr: the chosen peak for a batch of 256.
    """

    mean: float
    std: float
    lr: float
    num_labels: int
    num_draws: int
    batch_size: int
    num_steps: int
    recipe: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """The images to classify, and how they are read.

    view: the probes' view of the test split.  augmented: the view to train on, of which only crop and flip are used.
    """

    train: Source
    test: Source
    view: ViewSpec
    augmented: ViewSpec
    reading: data.Config
    ranks: Ranks

    @property
    def num_classes(self) -> int:
        return len(self.train.facts.classes or ())


class Classifier(nn.Module):
    """An encoder and a linear layer that starts from zeros: (B, C, H, W) -> (B, num_classes).

    standardized: as in ``Recipe``.
    """

    def __init__(self, encoder: Encoder, num_classes: int, *, standardized: bool = False) -> None:
        super().__init__()
        parameter = next(encoder.parameters())
        self.encoder = encoder
        norm = nn.BatchNorm1d(encoder.dim, affine=False, device=parameter.device, dtype=parameter.dtype)
        self.norm = norm if standardized else nn.Identity()
        self.head = nn.Linear(encoder.dim, num_classes, device=parameter.device, dtype=parameter.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.encoder(x)))


def recipe_of(encoder: Encoder, config: Config) -> Recipe:
    """Return the recipe for a kind of encoder, with the settings of the config.

    With batch norm (ResNets): SGD of momentum 0.9 without weight decay at the learning rate of SimCLR (arXiv
    2002.05709, appendix B.5: 0.05 for a batch of 256), with 20 times that rate for the new classifier as in SwAV's
    code (arXiv 2006.09882: 0.01 and 0.2 for 10 % of the labels).
    Without (ViTs, ConvNeXts): AdamW as in MAE (arXiv 2111.06377, table 9): learning rate 1e-3 for a batch of 256,
    weight decay 0.05, layer decay 0.75, label smoothing 0.1.  The rate goes with the root of the batch size (arXiv
    2205.10287), because MAE's linear rule would leave too little of it for the small batches of few labels.  A batch
    norm without weights comes before the classifier, as in MAE's linear probe (appendix A.1), so that the rates suit
    any encoder.
    Both: a linear warm-up over a tenth of the steps, then half a cosine; random resized crops and flips.
    Deviations: 30 epochs (SimCLR: 60 for 1 % and 30 for 10 % of ImageNet; MAE: 50 to 100) but at least 200 steps; no
    Nesterov momentum; no RandAugment, mixup, cutmix or drop path; three learning rates are tried.
    """
    if has_batch_norm(encoder):
        lrs = (0.0125, 0.05, 0.2)
        recipe = Recipe(optimizer="sgd", paper="SimCLR and SwAV", lrs=lrs, default_lr=lrs[1], head_scale=20.0)
    else:
        lrs = (0.00025, 0.001, 0.004)
        recipe = Recipe(
            optimizer="adamw", paper="MAE", lrs=lrs, default_lr=lrs[1], layer_decay=_layer_decay(encoder),
            lr_scaling="sqrt", standardized=True, weight_decay=0.05, label_smoothing=0.1,
        )  # fmt: skip
    if lrs := config.fine_tune_lrs:
        recipe = replace(recipe, lrs=lrs, default_lr=sorted(lrs)[(len(lrs) - 1) // 2])
    return replace(recipe, num_epochs=config.fine_tune_epochs, batch_size=config.fine_tune_batch_size)


def accuracy(
    encoder: Encoder,
    task: Task,
    amount: float,
    recipe: Recipe,
    *,
    num_draws: int,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Score:
    """Return the accuracy on the test split after fine-tuning a copy of the encoder on a fraction of the labels.

    amount: the fraction of each class's training labels, at least one label; 1 has a single draw.  The draws are those
      of the low-shot probe.
    On the first draw, a stratified tenth of its images (at least one of each class that has two) chooses the learning
    rate by accuracy, and of equals the one with the lowest loss; if each class has a single label, it is the recipe's
    default.  Then each draw is fitted whole and reads the test split once.
    All ranks must call this together, and each returns the same.  They share each batch, and batch norm is synchronized
    over ranks, so any number of ranks that divides the batch gives the same result up to rounding.
    Raises NonFiniteError if training diverges at the chosen rate.
    """
    assert task.train.facts.labels is not None
    label = torch.from_numpy(task.train.facts.labels)
    num_draws = 1 if amount == 1 else num_draws
    draws = [np.sort(low_shot.labeled_rows(label, float(amount), draw, seed)) for draw in range(num_draws)]
    what, num_fits = f"fine-tuning on {low_shot.words(float(amount))}", len(recipe.lrs) + num_draws
    batch_size, num_steps = recipe.fitted(len(draws[0]), task.ranks.world_size)

    def fit(rows: Rows, test: Source, lr: float, number: int) -> Features:
        def report(_: str, done: int, total: int) -> None:
            progress(what, number * total + done, num_fits * total)

        return logits(train(encoder, task, rows, lr, recipe, seed, progress=report), task, test)

    lr = recipe.default_lr
    held_out = _held_out(label[torch.from_numpy(draws[0])], seed)
    if len(recipe.lrs) > 1 and held_out is not None:
        kept, others = draws[0][~held_out], task.train.take(draws[0][held_out])
        lr = max(recipe.lrs, key=lambda lr: _quality(lambda: fit(kept, others, lr, recipe.lrs.index(lr))))
    try:
        tested = [fit(rows, task.test, lr, len(recipe.lrs) + i) for i, rows in enumerate(draws)]
    except NonFiniteError as error:
        raise NonFiniteError(
            f"fine-tuning diverged at learning rate {lr:g}: use smaller ones, such as --probe.fine-tune-lrs {lr / 10:g}"
        ) from error
    scores = [_accuracy(test) for test in tested]
    std = float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
    return Score(
        float(np.mean(scores)), std, lr, len(draws[0]), num_draws, batch_size, num_steps, recipe.words()
    )  # fmt: skip


def train(
    encoder: Encoder,
    task: Task,
    rows: Rows,
    lr: float,
    recipe: Recipe,
    seed: int = 0,
    *,
    progress: Progress = no_progress,
) -> Classifier:
    """Return a copy of the encoder with a classifier, trained on some rows of the training split.

    lr: the peak learning rate for a batch of 256.  Each step's batch, crops and flips depend on the seed only.
    """
    ranks, source = task.ranks, task.train.take(rows)
    batch_size, num_steps = recipe.fitted(len(rows), ranks.world_size)
    classifier = Classifier(deepcopy(encoder).requires_grad_(True), task.num_classes, standardized=recipe.standardized)
    if ranks.world_size > 1:
        norms.replace(classifier, "sync")
    model = parallel.wrap(classifier.train(), device=ranks.device)
    config = recipe.optim(lr)
    optimizer = optim.of_groups(config, groups(classifier, recipe))
    schedule = optim.Schedule.of(config, batch_size)
    dtype, autocast = classifier.head.weight.dtype, devices.autocast(ranks.device)
    loader = data.training(
        task.reading, source, [_crops_and_flips(task.augmented)],
        batch_size=batch_size, seed=seed, ranks=ranks, dtype=dtype,
    )  # fmt: skip
    try:
        for step in range(num_steps):
            batch = next(loader)
            assert batch.label is not None
            schedule.apply(optimizer, (step + 0.5) / num_steps)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(ranks.device.type, autocast, enabled=autocast is not None):
                outputs = model(batch.views[0])
            F.cross_entropy(outputs.to(dtype), batch.label, label_smoothing=recipe.label_smoothing).backward()
            optimizer.step()
            progress("", step + 1, num_steps)
    finally:
        loader.close()
    return classifier


def groups(classifier: Classifier, recipe: Recipe) -> Groups:
    """Return the optimizer's groups: those of the encoder, with layer decay, and the classifier's with its factor."""
    encoder = split(classifier.encoder, classifier.encoder.trunk, recipe.layer_decay)
    return [*encoder, *({**group, "lr_scale": recipe.head_scale} for group in split(classifier.head))]


def logits(classifier: Classifier, task: Task, source: Source) -> Features:
    """Return the logits (N, num_classes) of a source's images with the probes' view, computed over all ranks."""
    batches = data.evaluation(
        task.reading, source, task.view, batch_size=256, ranks=task.ranks, dtype=classifier.head.weight.dtype
    )
    autocast = devices.autocast(task.ranks.device)
    return features.extract(classifier, batches, autocast=autocast, num_samples=len(source))


def legend(scores: Sequence[Score]) -> list[str]:
    """Return one line for each recipe among the scores."""
    return [f"fine-tuned: {words}" for words in dict.fromkeys(score.recipe for score in scores)]


def _layer_decay(encoder: Encoder) -> float:
    """Return MAE's layer decay, or 1 for an encoder without blocks."""
    try:
        layers_of(encoder.trunk)
    except ConfigError:
        return 1.0
    return 0.75


def _crops_and_flips(view: ViewSpec) -> ViewSpec:
    """Return the view with its crops, flips and rotations, without pretraining's other changes of its pixels."""
    off = {"jitter": 0.0, "gray": 0.0, "blur": 0.0, "solarize": 0.0, "gain": 0.0, "noise": 0.0}
    return replace(view, augment=replace(view.augment or Augment(), **off))


def _held_out(label: Tensor, seed: int) -> npt.NDArray[np.bool_] | None:
    """Return a mask (N,) of the labeled images that choose the learning rate, or None if no class has two."""
    try:
        return held_out_mask(label, seed).numpy()
    except DataError:
        return None


def _quality(fit: Callable[[], Features]) -> tuple[float, float]:
    """Return the accuracy of a fit's logits and minus their loss; the lowest of all if the fit diverges."""
    try:
        result = fit()
    except NonFiniteError:
        return -1.0, -np.inf
    assert result.label is not None
    return _accuracy(result), -float(F.cross_entropy(result.x.double(), result.label))


def _accuracy(result: Features) -> float:
    assert result.label is not None
    return float((result.x.argmax(1) == result.label).double().mean())
