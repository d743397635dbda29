"""The weighted k-nearest-neighbor probe of Wu et al. (arXiv 1805.01978, section 3.4)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sslx.probe.features import Features, Progress, no_progress

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
    k = 200 and temperature = 0.07 are the values of the paper and of DINO's protocol (arXiv 2104.14294).  Deviation:
    k is at most the mean size of a class (see ``num_neighbors``).  Of equal similarities the earlier training sample
    counts as nearer, and of equal votes the lower class wins.  Only one (rows, N_train) block of similarities, about
    128 MiB, is in memory at a time.
    """
    assert train.label is not None
    assert test.label is not None
    k = num_neighbors(train.label, k)
    keys = F.normalize(train.x.to(device), dim=1)
    key_labels = train.label.to(device)
    rows_per_block = max(1, _BLOCK_BYTES // (4 * len(keys)))
    num_correct = 0
    for start in range(0, len(test.x), rows_per_block):
        stop = min(start + rows_per_block, len(test.x))
        queries = F.normalize(test.x[start:stop].to(device), dim=1)
        similarity, neighbor = nearest(queries @ keys.T, k)
        votes = torch.zeros(stop - start, num_classes, dtype=torch.float64, device=device)
        votes.scatter_add_(1, key_labels[neighbor], (similarity.double() / temperature).exp())
        num_correct += int((votes.argmax(1).cpu() == test.label[start:stop]).sum())
        progress("kNN", stop, len(test.x))
    return num_correct / len(test.x)


def num_neighbors(label: Tensor, k: int) -> int:
    """Return how many neighbors vote: ``k``, but at most the mean size of the classes in ``label`` (N,), at least 1.

    If classes are balanced and k exceeds their size, other classes would outvote even a perfect representation.  Using
    the mean size, a rare class has little influence, and k is unchanged in a split with k samples per class.
    """
    return max(1, min(k, len(label) // len(label.unique())))


def nearest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values in each row of (M, N) and their columns, both (M, k).

    Of equal values the lower column is taken.  ``topk`` breaks ties for the last place arbitrarily, so rows with such
    ties are sorted in full.
    """
    values, columns = similarity.topk(min(k + 1, similarity.shape[1]))
    tied = (values[:, k - 1 : -1] == values[:, k:]).any(1).nonzero()[:, 0]
    if len(tied):
        columns[tied, :k] = similarity[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return values[:, :k], columns[:, :k]
