"""The weighted k-nearest-neighbour probe of Wu et al. (arXiv 1805.01978, section 3.4)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sslx.probe.features import Features, Progress, silent

_CHUNK_BYTES = 128 << 20


def accuracy(
    train: Features,
    test: Features,
    num_classes: int,
    k: int = 200,
    temperature: float = 0.07,
    *,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> float:
    """Share of the test split, in [0, 1], that its neighbours in the training split classify correctly.

    The k training samples of largest cosine similarity s vote for their class with weight
    exp(s / temperature); k = 200 and temperature = 0.07 are the paper's, and those of DINO's protocol (arXiv
    2104.14294).  Deviation: k is at most the mean size of a class (``neighbors``).  Among equal similarities
    the earlier training sample is nearer; among equal votes the lower class wins.  Holds one (rows, N_train)
    block of similarities of about 128 MiB at a time.
    """
    assert train.label is not None
    assert test.label is not None
    k = neighbors(train.label, k)
    keys = F.normalize(train.x.to(device), dim=1)
    key_labels = train.label.to(device)
    rows = max(1, _CHUNK_BYTES // (4 * len(keys)))
    correct = 0
    for start in range(0, len(test.x), rows):
        stop = min(start + rows, len(test.x))
        queries = F.normalize(test.x[start:stop].to(device), dim=1)
        similarity, neighbour = nearest(queries @ keys.T, k)
        votes = torch.zeros(stop - start, num_classes, dtype=torch.float64, device=device)
        votes.scatter_add_(1, key_labels[neighbour], (similarity.double() / temperature).exp())
        correct += int((votes.argmax(1).cpu() == test.label[start:stop]).sum())
        progress("kNN", stop, len(test.x))
    return correct / len(test.x)


def neighbors(label: Tensor, k: int) -> int:
    """How many vote where ``k`` are asked for: at most the mean size of the classes in ``label`` (N,), at least 1.

    Of balanced classes, more than a class has would outvote even a perfect representation; one rare class changes
    nothing, and k is as asked wherever the split has k samples a class.
    """
    return max(1, min(k, len(label) // len(label.unique())))


def nearest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of (M, N) and their columns, both (M, k); the lower column where equal.

    ``topk`` picks any of those that tie for the last place, so the rows where some do are sorted in full.
    """
    values, columns = similarity.topk(min(k + 1, similarity.shape[1]))
    tied = (values[:, k - 1 : -1] == values[:, k:]).any(1).nonzero()[:, 0]
    if len(tied):
        columns[tied, :k] = similarity[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return values[:, :k], columns[:, :k]
