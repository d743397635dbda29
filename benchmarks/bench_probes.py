"""Time of the kNN and linear probes beside scikit-learn, on random features of classes that overlap.

    python benchmarks/run.py probes

The same features for all: 50,000 for training and 10,000 to test, with 512 dimensions and 10 classes.  kNN: that of
sslx with one k, and scikit-learn's exact search by cosine similarity with the same votes.  Linear: the whole probe of
sslx, which fits up to eight regressions to choose the regularization; its last fit alone; and scikit-learn's regression
with the regularization that was chosen.  By SGD: the whole probe of sslx, once.  Accuracies are printed beside the
times.  Fails if kNN takes 5 s or more, the linear probe 20 s or more, or an accuracy differs by more than 0.2 points.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from harness import Session, benchmark, option
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from sslx.bench import measure
from sslx.probe import knn, linear, sgd
from sslx.probe.features import Features

KNN_LIMIT_S, LINEAR_LIMIT_S, MAX_DIFFERENCE = 5.0, 20.0, 0.002
TEMPERATURE = 0.07
SGD = "linear by SGD, sslx"
CPU = torch.device("cpu")


def splits(num_train: int, num_test: int, dim: int, num_classes: int) -> tuple[Features, Features]:
    """Features of both splits: normal around the classes' centers, then mixed by a matrix, so that they correlate."""
    generator = torch.Generator().manual_seed(0)
    centers = 2.5 * torch.randn(num_classes, dim, generator=generator) / dim**0.5
    mixing = torch.randn(dim, dim, generator=generator)

    def split(num: int) -> Features:
        label = torch.arange(num) % num_classes
        x = (centers[label] + torch.randn(num, dim, generator=generator)) @ mixing
        return Features(x, label, torch.arange(num))

    return split(num_train), split(num_test)


def votes(distance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The weights of neighbors at these cosine distances, as ``sslx.probe.knn`` has them."""
    return np.exp((1 - distance) / TEMPERATURE)


def arms(train: Features, test: Features, num_classes: int, k: int) -> dict[str, Callable[[], float]]:
    """Calls by name, each of which returns an accuracy."""
    label, test_label = (split.label for split in (train, test))
    assert label is not None
    assert test_label is not None
    chosen = dict[str, float]()

    def neighbors() -> float:
        weights: Any = votes  # pyright takes scikit-learn's documentation for a type, str
        model = KNeighborsClassifier(k, weights=weights, algorithm="brute", metric="cosine")
        return float(model.fit(train.x.numpy(), label.numpy()).score(test.x.numpy(), test_label.numpy()))

    def probe() -> float:
        accuracy, chosen["C"] = linear.accuracy(train, test, num_classes)
        return accuracy

    def standardized() -> tuple[Tensor, Tensor]:
        x, mean, std = linear.standardize(train.x)
        return x, (test.x - mean) / std

    def fit() -> float:
        x, test_x = standardized()
        weight = linear.fit(x, label, num_classes, chosen["C"])
        return float((linear.predict(test_x, weight) == test_label).double().mean())

    def regression() -> float:
        x, test_x = standardized()
        model = LogisticRegression(C=chosen["C"], max_iter=1000).fit(x.numpy(), label.numpy())
        return float(model.score(test_x.numpy(), test_label.numpy()))

    return {
        "kNN, sslx": lambda: knn.accuracy(train, test, num_classes, k, TEMPERATURE),
        "kNN, scikit-learn": neighbors,
        "linear, sslx": probe,
        "linear, sslx, last fit": fit,
        "linear, scikit-learn": regression,
        SGD: lambda: sgd.score(train, test, num_classes).accuracy,
    }


@benchmark(
    option("--num-train", type=int, default=50_000, help="training images"),
    option("--num-test", type=int, default=10_000, help="test images"),
    option("--dim", type=int, default=512, help="dimensions of the features"),
    option("--num-classes", type=int, default=10),
    option("--k", type=int, default=20, help="neighbors that vote"),
    windows=3,
)
def run(session: Session) -> bool:
    options = session.options
    noise = measure.warn_of_noise(CPU, print)
    train, test = splits(options.num_train, options.num_test, options.dim, options.num_classes)
    calls = arms(train, test, options.num_classes, options.k)
    seconds = {name: list[float]() for name in calls}
    accuracies = dict[str, float]()
    for window in range(options.windows):  # in turns, so that a change of the machine's speed is fair to all
        for name, call in calls.items():
            if window and name == SGD:
                continue
            start = time.perf_counter()
            accuracies[name] = call()
            seconds[name].append(time.perf_counter() - start)
            print(f"{name:24} {seconds[name][-1]:7.2f} s   {100 * accuracies[name]:.2f} %", flush=True)
    summaries = {name: measure.summarize(times) for name, times in seconds.items()}
    session.record(num_train=options.num_train, num_test=options.num_test, dim=options.dim, k=options.k,
                   num_classes=options.num_classes, noise=noise, threads=torch.get_num_threads(), seconds=summaries,
                   accuracy=accuracies)  # fmt: skip
    differences = [
        abs(accuracies["kNN, sslx"] - accuracies["kNN, scikit-learn"]),
        abs(accuracies["linear, sslx"] - accuracies["linear, scikit-learn"]),
    ]
    return (
        summaries["kNN, sslx"]["median"] < KNN_LIMIT_S
        and summaries["linear, sslx"]["median"] < LINEAR_LIMIT_S
        and max(differences) <= MAX_DIFFERENCE
    )
