import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thintune.linalg import data_aware_factors, output_spectrum, weighted_factors, weighted_spectrum, worth_root


def setting(o, i, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(o, i, generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, -2, i, dtype=torch.float64)
    x = torch.randn(200, i, generator=generator, dtype=torch.float64) * scales + 0.5
    mean = x.mean(0)
    worth = torch.rand(o, generator=generator, dtype=torch.float64) * 5 + 0.1
    return weight, x, mean, (x - mean).T @ (x - mean) / len(x), worth


def loss(x, weight, factors, worth):
    left, right, shift = factors
    return float(((x @ weight.T - (x @ right.T @ left.T + shift)).square() * worth).sum(1).mean())


@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 50), st.data())
@settings(deadline=None, max_examples=50)
def test_the_weighted_loss_is_the_tail_of_a_plain_svd_and_no_rival_loses_less(o, i, seed, data):
    rank = data.draw(st.integers(1, min(o, i)))
    weight, x, mean, covariance, worth = setting(o, i, seed)
    root = worth_root(worth)
    found = weighted_factors(weight, covariance, mean, rank, root)
    values = torch.linalg.svdvals(root[:, None] * weight @ torch.linalg.cholesky(covariance)).square()
    assert (found[0].T @ found[0] - torch.eye(rank)).abs().max() < 1e-12
    assert (weighted_spectrum(weight, covariance, root) - values).abs().max() < 1e-9 * float(values.sum())
    lost = loss(x, weight, found, root.square())
    assert abs(lost - float(values[rank:].sum())) < 1e-9 * float(values.sum())
    rivals = [data_aware_factors(weight, covariance, mean, rank)]
    for _ in range(5):
        left = found[0] + 0.1 * torch.randn(o, rank, dtype=torch.float64)
        right = found[1] + 0.1 * torch.randn(rank, i, dtype=torch.float64)
        rivals.append((left, right, weight @ mean - left @ (right @ mean)))
    for rival in rivals:
        assert lost <= loss(x, weight, rival, root.square()) + 1e-9 * float(values.sum())


@pytest.mark.parametrize(("o", "i"), [(5, 8), (8, 5)])
@pytest.mark.parametrize("worth", [0.0, 3.0])
def test_outputs_of_equal_worth_change_nothing(o, i, worth):
    weight, _, mean, covariance, _ = setting(o, i, 1)
    root = worth_root(torch.full((o,), worth))
    left, right, shift = weighted_factors(weight, covariance, mean, 3, root)
    plain = data_aware_factors(weight, covariance, mean, 3)
    assert (left @ right - plain[0] @ plain[1]).abs().max() < 1e-12
    assert (shift - plain[2]).abs().max() < 1e-12
    spectrum = output_spectrum(weight, covariance) * worth
    assert (weighted_spectrum(weight, covariance, root) - spectrum).abs().max() < 1e-12 * (1 + spectrum[0])


def test_no_output_is_given_up_for_being_worth_nothing_to_a_few_images():
    assert torch.allclose(worth_root(torch.tensor([0.0, 2.0])).square(), torch.tensor([0.01, 2.0]).double())


def test_full_rank_is_exact_in_the_type_of_the_weight():
    weight, x, mean, covariance, worth = setting(8, 5, 2)
    left, right, shift = weighted_factors(weight.float(), covariance.float(), mean.float(), 5, worth_root(worth))
    assert left.dtype == right.dtype == shift.dtype == torch.float32
    assert (x @ (left @ right).double().T + shift - x @ weight.T).abs().max() < 1e-5
