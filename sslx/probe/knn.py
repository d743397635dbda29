"""The weighted k-nearest-neighbor probe of Wu et al. (arXiv 1805.01978, section 3.4), and its choice of k."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sslx.probe.features import Features, Progress, no_progress
from sslx.probe.linear import held_out_mask

MAX_HELD_OUT = 5_000
"""Maximum number of training images on which k is chosen, so that the choice costs less than the test."""
_BLOCK_BYTES = 128 << 20


def accuracy(
    train: Features,
    test: Features,
    num_classes: int,
    k: int = 200,
    temperature: float = 0.07,
    *,
    device: torch.device | None = None,
    progress: Progress = no_progress,
) -> float:
    """Return the fraction of the test split, in [0, 1], that its neighbors in the training split classify correctly.

    The k training samples with the largest cosine similarity s vote for their class with weight exp(s / temperature).
    k = 200 and temperature = 0.07 are the values of the paper.  Deviation: k is at most the mean size of a class (see
    ``num_neighbors``).  Of equal similarities the earlier training sample counts as nearer, and of equal votes the
    lower class wins.  Only one (rows, N_train) block of similarities, about 128 MiB, is in memory at a time.
    """
    return accuracies(train, test, num_classes, (k,), temperature, device=device, progress=progress)[k]


def accuracies(
    train: Features,
    test: Features,
    num_classes: int,
    ks: Sequence[int],
    temperature: float = 0.07,
    *,
    device: torch.device | None = None,
    progress: Progress = no_progress,
) -> dict[int, float]:
    """Return the accuracy, as ``accuracy`` defines it, for each of several k, from one search for neighbors."""
    assert test.label is not None
    predicted = predictions(train, test, num_classes, ks, temperature, device=device, progress=progress)
    return {k: int((classes == test.label).sum()) / len(test.x) for k, classes in predicted.items()}


def predictions(
    train: Features,
    test: Features,
    num_classes: int,
    ks: Sequence[int],
    temperature: float = 0.07,
    *,
    device: torch.device | None = None,
    progress: Progress = no_progress,
) -> dict[int, Tensor]:
    """Return the predicted classes (N,) of the test split, on the CPU, for each of several k."""
    assert train.label is not None
    numbers = [num_neighbors(train.label, k) for k in ks]
    keys = F.normalize(train.x.to(device), dim=1)
    key_labels = train.label.to(device)
    rows_per_block = max(1, min(_BLOCK_BYTES // (4 * len(keys)), len(test.x)))
    block = keys.new_empty(rows_per_block, len(keys))  # reused: a new one each time costs a fifth of the search
    predicted = {k: torch.empty(len(test.x), dtype=torch.int64) for k in ks}
    for start in range(0, len(test.x), rows_per_block):
        stop = min(start + rows_per_block, len(test.x))
        queries = F.normalize(test.x[start:stop].to(device), dim=1)
        similarity = torch.mm(queries, keys.T, out=block[: stop - start])
        similarity, neighbor = nearest(similarity, max(numbers), *numbers)
        weight, voted = (similarity.double() / temperature).exp(), key_labels[neighbor]
        for k, number in zip(ks, numbers, strict=True):
            votes = torch.zeros(stop - start, num_classes, dtype=torch.float64, device=device)
            votes.scatter_add_(1, voted[:, :number], weight[:, :number])
            predicted[k][start:stop] = votes.argmax(1)
        progress("kNN", stop, len(test.x))
    return predicted


def choose_k(
    train: Features,
    num_classes: int,
    ks: Sequence[int],
    temperature: float = 0.07,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Progress = no_progress,
) -> tuple[int, dict[int, float]]:
    """Return the best of several k, and the accuracies on held-out training images on which it was chosen.

    DINO (arXiv 2104.14294) sweeps k as well.  Here a stratified tenth of the training split, at most ``MAX_HELD_OUT``
    images, is classified by the others, so that the test split is read only once.  Of equals, the smallest k is chosen.
    A k above the mean size of a class counts as that size (see ``num_neighbors``); if only one k is left, nothing is
    measured and the second value is empty.
    """
    assert train.label is not None
    numbers = sorted({num_neighbors(train.label, k) for k in ks})
    if len(numbers) == 1:
        return numbers[0], {}
    rows = held_out_mask(train.label, seed).nonzero()[:, 0]
    if len(rows) > MAX_HELD_OUT:
        rows = rows[torch.linspace(0, len(rows) - 1, MAX_HELD_OUT).long()]
    kept = torch.ones(len(train.x), dtype=torch.bool)
    kept[rows] = False
    others, held_out = (Features(train.x[i], train.label[i], train.index[i]) for i in (kept, rows))
    scores = accuracies(others, held_out, num_classes, numbers, temperature, device=device, progress=progress)
    return max(numbers, key=lambda k: scores[k]), scores


def num_neighbors(label: Tensor, k: int) -> int:
    """Return how many neighbors vote: ``k``, but at most the mean size of the classes in ``label`` (N,), at least 1.

    If classes are balanced and k exceeds their size, other classes would outvote even a perfect representation.  Using
    the mean size, a rare class has little influence, and k is unchanged in a split with k samples per class.
    """
    return max(1, min(k, len(label) // len(label.unique())))


def nearest(similarity: Tensor, k: int, *smaller: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values in each row of (M, N) and their columns, both (M, k).

    Of equal values the lower column is taken.  ``topk`` breaks ties for the last place arbitrarily, so rows with such
    ties are sorted in full.  smaller: numbers below k whose own last place matters too.
    """
    values, columns = similarity.topk(min(k + 1, similarity.shape[1]))
    tied = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    for number in {k, *smaller}:
        tied |= (values[:, number - 1 : number] == values[:, number : number + 1]).any(1)
    rows = tied.nonzero()[:, 0]
    if len(rows):
        columns[rows, :k] = similarity[rows].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return values[:, :k], columns[:, :k]
