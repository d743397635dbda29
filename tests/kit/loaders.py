"""Loaders of a source on the CPU in fp32, and whether what they bring is the same to the last bit."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal

import pytest
import torch

from sslx.data import Config, Loader, evaluation, training
from sslx.data.batch import Batch
from sslx.data.sources import Source
from sslx.data.views import ViewSpec
from sslx.distributed import Ranks

CPU = torch.device("cpu")
Backend = Literal["dali", "torchvision", "resident"]
BACKENDS: tuple[Backend, ...] = ("dali", "torchvision", "resident")
every_backend = pytest.mark.parametrize("backend", BACKENDS, scope="module")
AS_STORED: dict[str, Any] = {"mean": (0, 0, 0), "std": (1 / 255, 1 / 255, 1 / 255)}
"""Of a ViewSpec: such that the values of the view are 0..255."""


def training_loader(source: Source, backend: str, specs: Sequence[ViewSpec], **options: Any) -> Loader:
    """options: of ``Config``, of ``Ranks`` and of ``training``.  Batches of 6, seed 3 and few threads by default."""
    config, arguments = _split(backend, options)
    return training(config, source, specs, **(dict[str, Any](batch_size=6, seed=3) | arguments))


def evaluation_loader(source: Source, backend: str, spec: ViewSpec, **options: Any) -> Loader:
    """options: of ``Config``, of ``Ranks`` and of ``evaluation``.  Batches of 4 by default."""
    config, arguments = _split(backend, options)
    return evaluation(config, source, spec, **(dict[str, Any](batch_size=4) | arguments))


def _split(backend: str, options: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    options = {"backend": backend, "threads": int(backend == "dali"), "device": CPU, "dtype": torch.float32, **options}
    of_config, of_ranks = (
        {field.name: options.pop(field.name) for field in fields(kind) if field.name in options}
        for kind in (Config, Ranks)
    )
    return Config(**of_config), {"ranks": Ranks(**of_ranks), **options}


def take(loader: Loader, number: int) -> list[Batch]:
    return [next(loader) for _ in range(number)]


def labels_of(batch: Batch) -> list[int]:
    assert batch.label is not None
    return batch.label.tolist()


def joined(shares: Sequence[Batch]) -> Batch:
    """The shares of one batch on all ranks, put together."""
    return Batch(
        tuple(torch.cat(views) for views in zip(*(share.views for share in shares), strict=True)),
        torch.tensor([label for share in shares for label in labels_of(share)]),
        torch.cat([share.index for share in shares]),
        tuple(torch.cat(arrays) for arrays in zip(*(share.draws for share in shares), strict=True)),
    )


def assert_same(got: Sequence[Batch], expected: Sequence[Batch]) -> None:
    """The same samples with the same labels, views and draws."""
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        assert (a.label is None, len(a.views)) == (b.label is None, len(b.views))
        assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def tensors(batch: Batch) -> list[torch.Tensor]:
    return [batch.index, *([] if batch.label is None else [batch.label]), *batch.views, *batch.draws]
