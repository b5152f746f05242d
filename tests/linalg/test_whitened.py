import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thintune.errors import ConversionError
from thintune.linalg import data_aware_factors, truncated_svd, whitened_factors
from thintune.linalg.whitened import whitening


def setting(o, i, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(o, i, generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, -1.5, i, dtype=torch.float64)[torch.randperm(i, generator=generator)]
    x = torch.randn(200, i, generator=generator, dtype=torch.float64) * scales + 0.3 * scales
    return weight, x, x.T @ x / len(x)


def lost(x, weight, product):
    """Mean squared loss of the layer's output, from the rows themselves."""
    return float((x @ (weight - product).T).square().sum(1).mean())


@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 50), st.data())
@settings(deadline=None, max_examples=50)
def test_the_truncation_loses_the_discarded_singular_values_and_nothing_loses_less(o, i, seed, data):
    rank = data.draw(st.integers(1, min(o, i)))
    weight, x, second = setting(o, i, seed)
    left, right = whitened_factors(weight, second, rank=rank)
    assert left.shape == (o, rank) and right.shape == (rank, i)
    assert (left.T @ left - torch.eye(rank)).abs().max() < 1e-12
    values = torch.linalg.svdvals(weight @ torch.linalg.cholesky(second)).square()
    found = lost(x, weight, left @ right)
    total = float(values.sum())
    assert abs(found - float(values[rank:].sum())) < 1e-5 * total  # the ridge is 1e-6
    plain = truncated_svd(weight, rank=rank)
    assert found <= lost(x, weight, plain[0] @ plain[1]) + 1e-5 * total
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-3, 1e-1):
        other = [f + size * torch.randn(f.shape, generator=generator, dtype=torch.float64) for f in (left, right)]
        assert found <= lost(x, weight, other[0] @ other[1]) + 1e-5 * total


@pytest.mark.parametrize(("o", "i"), [(5, 8), (8, 5), (7, 7)])
def test_the_factors_are_those_of_the_equation_with_the_inverse(o, i):
    weight, _, second = setting(o, i, 1)
    s = whitening(second)
    assert (s - s.tril()).abs().max() == 0
    ridge = 1e-6 * second.diagonal().mean() * torch.eye(i)
    assert (s @ s.T - second - ridge).abs().max() < 1e-12
    u, values, vh = torch.linalg.svd(weight @ s, full_matrices=False)
    expected = u[:, :3] @ torch.diag(values[:3]) @ vh[:3] @ torch.linalg.inv(s)
    left, right = whitened_factors(weight, second, rank=3)
    assert (left @ right - expected).abs().max() < 1e-10


@pytest.mark.parametrize(("o", "i"), [(5, 8), (8, 5)])
def test_they_are_the_data_aware_factors_of_inputs_that_are_not_centred(o, i):
    weight, _, second = setting(o, i, 2)
    ridge = 1e-6 * float(second.diagonal().mean())
    left, right, shift = data_aware_factors(weight, second, torch.zeros(i).double(), 3, ridge)
    found = whitened_factors(weight, second, rank=3)
    assert (found[0] @ found[1] - left @ right).abs().max() < 1e-10 and not shift.any()


def test_a_share_of_the_whitened_variance_gives_the_rank():
    weight, _, second = setting(8, 6, 3)
    values = torch.linalg.svdvals(weight @ whitening(second)).square()
    kept = values.cumsum(0) / values.sum()
    for share in (0.3, 0.9, 0.999):
        left, _ = whitened_factors(weight, second, explained_variance=share)
        assert left.shape[1] == 1 + int((kept < share).sum())


def test_inputs_that_span_little_or_nothing_do_no_harm():
    weight, x, _ = setting(6, 8, 4)
    for rows in (x[:3], torch.zeros(3, 8).double()):
        second = (rows.T @ rows / 3).float()
        left, right = whitened_factors(weight.float(), second, rank=4)
        assert torch.isfinite(left).all() and torch.isfinite(right).all() and left.dtype == torch.float32
        assert lost(rows, weight, (left @ right).double()) < 1e-6
    with pytest.raises(ConversionError, match="not finite"):
        whitened_factors(weight, torch.full((8, 8), torch.nan), rank=2)
