"""What operators cost, against numbers by hand."""

import torch
from torch.nn import functional as F

from sslx.bench import operators

CPU = torch.device("cpu")


def test_a_product_and_a_convolution_by_hand() -> None:
    a, b = torch.randn(30, 20), torch.randn(20, 50)
    image, kernel = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    costs = {cost.name: cost for cost in operators.costs(lambda: (a @ b, F.conv2d(image, kernel)), CPU)}
    assert costs["mm"].flops == 2 * 30 * 20 * 50
    assert costs["mm"].nbytes == 4 * (30 * 20 + 20 * 50 + 30 * 50)
    assert costs["convolution"].flops == 2 * (2 * 4 * 6 * 6) * (3 * 3 * 3)
    assert costs["convolution"].calls == 1
    assert all(cost.seconds > 0 for cost in costs.values())


def test_the_backward_counts_and_a_view_costs_nothing() -> None:
    a, b = torch.randn(30, 20, requires_grad=True), torch.randn(20, 50, requires_grad=True)
    costs = {cost.name: cost for cost in operators.costs(lambda: (a @ b).sum().backward(), CPU)}
    assert costs["mm"].calls == 3
    assert costs["mm"].flops == 3 * 2 * 30 * 20 * 50
    assert costs["t"].flops == costs["t"].nbytes == 0


def test_other_operators_count_an_operation_for_each_element() -> None:
    x = torch.randn(7, 5)
    costs = operators.costs(lambda: x.relu(), CPU)
    assert [(cost.name, cost.flops, cost.nbytes) for cost in costs] == [("relu", 35, 2 * 4 * 35)]
