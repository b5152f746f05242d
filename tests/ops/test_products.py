"""The fast products against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from thintune.measure import count_flops
from thintune.ops.products import linear, linear_into

SHAPES = [(1, 3, 2), (17, 31, 5), (197, 64, 48), (64, 7, 130)]


@pytest.mark.parametrize(("m", "i", "o"), SHAPES)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_equal_torchs_own_to_rounding(m, i, o, turned, biased):
    x = torch.randn(m, i)
    weight = torch.randn(i, o).T if turned else torch.randn(o, i)
    bias = torch.randn(o) if biased else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias).double(), exact, rtol=1e-5, atol=1e-5)
        if bias is not None:
            into = linear_into(torch.empty(m, o), x, weight, bias)
            torch.testing.assert_close(into.double(), exact, rtol=1e-5, atol=1e-5)


def test_turned_rows_serve_as_both_sides():
    seen, grad = torch.randn(50, 4), torch.randn(50, 24)
    with torch.no_grad():
        torch.testing.assert_close(linear(seen.T, grad.T), seen.T @ grad, rtol=1e-5, atol=1e-5)


def test_other_types_and_recorded_graphs_take_torchs_own_path():
    x, weight = torch.randn(4, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    leaf = torch.randn(3, 6, requires_grad=True)
    linear(torch.randn(4, 6), leaf).sum().backward()
    assert leaf.grad is not None


def test_no_rows_give_no_rows():
    with torch.no_grad():
        assert linear(torch.zeros(0, 4), torch.ones(3, 4)).shape == (0, 3)


def test_flops_are_those_of_the_product():
    x, weight = torch.randn(10, 6), torch.randn(3, 6)
    with torch.no_grad():
        assert count_flops(lambda: linear(x, weight)) == 2 * 10 * 6 * 3


def test_shapes_beyond_the_limit_take_torchs_own_path(monkeypatch):
    from thintune.ops import products

    monkeypatch.setattr(products, "_kernels", products._Kernels())
    products.limit_kernels(1)
    x, small, large = torch.randn(10, 6), torch.randn(3, 6), torch.randn(5, 6)
    with torch.no_grad():
        linear(x, small), linear(x, small)
        assert torch.equal(linear(x, large), F.linear(x, large))
    assert len(products._kernels.met) == (1 if products._BUILT_IN else 0)


def test_without_kernels_no_shape_gets_one_and_the_limit_comes_back(monkeypatch):
    from thintune.ops import products

    monkeypatch.setattr(products, "_kernels", products._Kernels())
    x, weight = torch.randn(10, 6), torch.randn(3, 6)
    limit = products._kernels.limit
    with torch.no_grad(), products.without_kernels():
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert products._kernels.limit == limit and not products._kernels.met
