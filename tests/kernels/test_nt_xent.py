"""NT-Xent over rows and columns, against its definition written as two loops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sslx_kernels.nt_xent import nt_xent


def brute_force(
    rows: Tensor, columns: Tensor, self_column: Tensor, positive_column: Tensor, temperature: float
) -> float:
    """Equation 1 of arXiv 2002.05709, in Python's own floats."""

    def cosine(a: list[float], b: list[float]) -> float:
        norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / norms

    total = 0.0
    for i, row in enumerate(rows.tolist()):
        s = [cosine(row, column) / temperature for column in columns.tolist()]
        denominator = sum(math.exp(x) for j, x in enumerate(s) if j != int(self_column[i]))
        total += math.log(denominator) - s[int(positive_column[i])]
    return total / len(rows)


def make(
    generator: torch.Generator, size: int = 5, dim: int = 4, first: int = 0, num: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows ``first`` to ``first + num`` of the 2 * size columns, in fp64."""
    columns = torch.randn(2 * size, dim, dtype=torch.float64, generator=generator)
    own = torch.arange(2 * size)[first : None if num is None else first + num]
    return columns[own], columns, own, (own + size) % (2 * size)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.05])
@pytest.mark.parametrize(("first", "num"), [(0, None), (3, 4), (9, 1)])
def test_is_the_definition(generator: torch.Generator, temperature: float, first: int, num: int | None) -> None:
    arguments = make(generator, first=first, num=num)
    expected = brute_force(*arguments, temperature)
    assert nt_xent(*arguments, temperature).item() == pytest.approx(expected, rel=1e-12)
    tensor = torch.tensor([temperature], dtype=torch.float64)
    assert nt_xent(*arguments, tensor, impl="reference").item() == pytest.approx(expected, rel=1e-12)


def test_gradients(generator: torch.Generator) -> None:
    rows, columns, own, positive = make(generator, first=2, num=5)
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)

    def loss(rows: Tensor, columns: Tensor, temperature: Tensor) -> Tensor:
        return nt_xent(rows, columns, own, positive, temperature)

    inputs = (rows.clone().requires_grad_(), columns.clone().requires_grad_(), temperature)
    assert torch.autograd.gradcheck(loss, inputs)


def test_closed_forms() -> None:
    size, temperature = 4, 0.5
    own = torch.arange(2 * size)
    positive = (own + size) % (2 * size)
    equal = torch.ones(2 * size, 3, dtype=torch.float64)
    assert nt_xent(equal, equal, own, positive, temperature).item() == pytest.approx(math.log(2 * size - 1))
    pairs = torch.eye(size, dtype=torch.float64).repeat(2, 1)
    expected = math.log(1 + (2 * size - 2) * math.exp(-1 / temperature))
    assert nt_xent(pairs, pairs, own, positive, temperature).item() == pytest.approx(expected)


def test_anti_aligned_positives_at_a_low_temperature_are_finite() -> None:
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    own = torch.arange(4)
    loss = nt_xent(z, z, own, (own + 2) % 4, 0.005)
    assert loss.item() == pytest.approx(200 + math.log(2), rel=1e-6)


def test_the_length_of_a_row_does_not_matter(generator: torch.Generator) -> None:
    rows, columns, own, positive = make(generator)
    lengths = torch.rand(len(rows), 1, dtype=torch.float64, generator=generator) * 10 + 0.1
    scaled = nt_xent(rows * lengths, columns * lengths, own, positive, 0.1)
    assert scaled.item() == pytest.approx(nt_xent(rows, columns, own, positive, 0.1).item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_fp32(generator: torch.Generator, dtype: torch.dtype) -> None:
    rows, columns, own, positive = make(generator, size=16, dim=32)
    rows, columns = rows.to(dtype).requires_grad_(), columns.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent(rows, columns, own, positive, 0.1)
    loss.backward()
    exact = nt_xent(rows.detach().double(), columns.double(), own, positive, 0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-6)
    assert rows.grad is not None
    assert rows.grad.dtype == dtype


def test_nan_stays_nan(generator: torch.Generator) -> None:
    rows, columns, own, positive = make(generator)
    columns[3, 1] = torch.nan
    assert nt_xent(rows, columns, own, positive, 0.1).isnan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(4)}, "rows"),
        ({"rows": torch.zeros(4, 2)}, r"\(4, 2\) and \(4, 3\)"),
        ({"rows": torch.zeros(4, 3, dtype=torch.int64)}, "floats"),
        ({"self_column": torch.arange(3)}, "self_column"),
        ({"positive_column": torch.arange(4).int()}, "positive_column.*int32"),
        ({"temperature": 0.0}, "positive temperature, got 0.0"),
        ({"temperature": torch.ones(2)}, "one element"),
        ({"impl": "fastest"}, "one of auto, reference, got 'fastest'"),
        ({"columns": torch.zeros(4, 3, device="meta")}, "one device, got cpu, meta"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(change: dict[str, Any], message: str) -> None:
    index = torch.arange(4)
    good = {"rows": torch.ones(4, 3), "columns": torch.ones(4, 3), "self_column": index}
    with pytest.raises(ValueError, match=message) as raised:
        nt_xent(**{**good, "positive_column": index.flip(0), "temperature": 0.1, **change})
    assert "\n" not in str(raised.value)
