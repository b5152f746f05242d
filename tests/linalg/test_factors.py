import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thintune.linalg import data_aware_factors, factors, input_basis, output_spectrum, truncated_svd


def setting(o, i, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(o, i, generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, -2, i, dtype=torch.float64)
    x = torch.randn(200, i, generator=generator, dtype=torch.float64) * scales + 0.5
    mean = x.mean(0)
    return weight, x, mean, (x - mean).T @ (x - mean) / len(x)


def output_error(x, weight, left, right, shift):
    return float((x @ weight.T - (x @ right.T @ left.T + shift)).square().sum(1).mean())


@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 50), st.data())
@settings(deadline=None, max_examples=50)
def test_the_lost_output_is_the_discarded_variance_and_no_more_than_with_svd(o, i, seed, data):
    rank = data.draw(st.integers(1, min(o, i)))
    weight, x, mean, covariance = setting(o, i, seed)
    left, right, shift = data_aware_factors(weight, covariance, mean, rank)
    spectrum = output_spectrum(weight, covariance)
    error = output_error(x, weight, left, right, shift)
    assert (left.T @ left - torch.eye(rank)).abs().max() < 1e-12
    assert abs(error - float(spectrum[rank:].sum())) < 1e-9 * float(spectrum.sum())
    svd_left, svd_right = truncated_svd(weight, rank=rank)
    svd_shift = weight @ mean - svd_left @ (svd_right @ mean)
    assert error <= output_error(x, weight, svd_left, svd_right, svd_shift) + 1e-9 * float(spectrum.sum())


@pytest.mark.parametrize(("o", "i"), [(5, 8), (8, 5)])
def test_the_spectrum_is_that_of_the_output(o, i):
    weight, x, mean, covariance = setting(o, i, 1)
    expected = torch.linalg.eigvalsh(weight @ covariance @ weight.T).flip(0)[: min(o, i)]
    assert (output_spectrum(weight, covariance) - expected).abs().max() < 1e-10
    outputs = (x - mean) @ weight.T
    assert abs(output_spectrum(weight, covariance).sum() - outputs.square().sum(1).mean()) < 1e-9


@pytest.mark.parametrize(("o", "i"), [(5, 8), (8, 5)])
def test_full_rank_is_exact_and_any_rank_keeps_the_mean_output(o, i):
    weight, x, mean, covariance = setting(o, i, 2)
    left, right, shift = data_aware_factors(weight, covariance, mean, min(o, i))
    assert (x @ right.T @ left.T + shift - x @ weight.T).abs().max() < 1e-10
    left, right, shift = data_aware_factors(weight, covariance, mean, 2)
    assert ((x @ right.T @ left.T + shift - x @ weight.T).mean(0)).abs().max() < 1e-10


def test_dead_inputs_do_no_harm():
    weight = torch.randn(8, 5, dtype=torch.float64)
    left, right, shift = data_aware_factors(weight, torch.zeros(5, 5).double(), torch.zeros(5).double(), 3)
    assert all(torch.isfinite(t).all() for t in (left, right, shift))
    assert (left.T @ left - torch.eye(3)).abs().max() < 1e-10


def test_the_input_basis_holds_the_leading_directions():
    x = torch.randn(100, 7, dtype=torch.float64) * torch.tensor([1.0, 9, 2, 8, 3, 0.1, 4]).double()
    basis = input_basis(x.T @ x / 100, 3)
    best = torch.linalg.svdvals(x)[:3].square().sum()
    assert abs((x @ basis).square().sum() - best) < 1e-8 * best


@pytest.mark.parametrize(("o", "i"), [(5, 8), (8, 5), (7, 7)])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_pieces_and_ridge_are_those_of_the_whole(o, i, ridge, monkeypatch):
    weight, _, mean, covariance = setting(o, i, 3)
    spread = covariance + ridge * torch.eye(i, dtype=torch.float64)
    expected = torch.linalg.eigvalsh(weight @ spread @ weight.T).flip(0)[: min(o, i)]
    whole = data_aware_factors(weight, spread, mean, 3)
    monkeypatch.setattr(factors, "_PIECE", 3)
    assert (output_spectrum(weight, covariance, ridge) - expected).abs().max() < 1e-12 * expected[0]
    left, right, shift = data_aware_factors(weight, covariance, mean, 3, ridge)
    assert (left @ right - whole[0] @ whole[1]).abs().max() < 1e-10
    assert (shift - whole[2]).abs().max() < 1e-10


def test_a_large_input_basis_is_nearly_the_best(monkeypatch):
    scales = torch.arange(1, 61, dtype=torch.float64) ** -0.7
    x = torch.randn(300, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * scales
    second = x.T @ x / 300
    monkeypatch.setattr(factors, "_EXACT_FEATURES", 40)
    basis = input_basis(second, 8)
    assert (basis.T @ basis - torch.eye(8)).abs().max() < 1e-12
    best = torch.linalg.eigvalsh(second)[-8:].sum()
    assert 0.999 * best < (basis.T @ second @ basis).trace() <= best
    assert torch.equal(basis, input_basis(second, 8))
    assert input_basis(second.float(), 8).dtype == torch.float32
