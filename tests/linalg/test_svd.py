import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thintune.errors import ConfigError
from thintune.linalg import orthonormalize, rank_for_explained_variance, truncated_svd

SIZES = st.integers(1, 9)


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(SIZES, SIZES, st.integers(0, 99), st.data())
@settings(deadline=None, max_examples=60)
def test_the_truncation_error_is_the_discarded_tail(rows, columns, seed, data):
    rank = data.draw(st.integers(1, min(rows, columns)))
    weight = matrix(rows, columns, seed)
    left, right = truncated_svd(weight, rank=rank)
    tail = torch.linalg.svdvals(weight)[rank:].norm()
    assert left.shape == (rows, rank) and right.shape == (rank, columns)
    assert abs((weight - left @ right).norm() - tail) < 1e-12
    assert (left.T @ left - torch.eye(rank)).abs().max() < 1e-12


def test_full_rank_is_exact_and_zeros_stay_zeros():
    weight = matrix(5, 7, 0)
    left, right = truncated_svd(weight, explained_variance=1.0)
    assert (left @ right - weight).abs().max() < 1e-12
    left, right = truncated_svd(torch.zeros(4, 3, dtype=torch.float64), explained_variance=0.9)
    assert left.shape[1] == 1 and not (left @ right).any()


@pytest.mark.parametrize("bad", [{"rank": 6}, {"rank": 0}, {}, {"rank": 1, "explained_variance": 0.5}])
def test_a_rank_out_of_range_is_refused(bad):
    with pytest.raises(ConfigError):
        truncated_svd(matrix(5, 7, 0), **bad)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(ConfigError, match="explained_variance"):
        rank_for_explained_variance(torch.ones(3), share)


@given(st.lists(st.floats(0, 1e3, allow_subnormal=False), min_size=1, max_size=8), st.floats(0.01, 0.999))
@settings(deadline=None)
def test_the_rank_is_the_smallest_that_explains_the_share(values, share):
    variances = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    rank = rank_for_explained_variance(variances, share)
    total = variances.sum()
    assert 1 <= rank <= len(values)
    if total > 0:
        assert variances[:rank].sum() >= share * total * (1 - 1e-9)
        assert rank == 1 or variances[: rank - 1].sum() < share * total * (1 + 1e-9)


@given(SIZES, SIZES, st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_a_basis_is_orthonormal_spans_the_columns_and_moves_continuously(extra, columns, seed):
    tall = matrix(columns + extra, columns, seed)
    basis = orthonormalize(tall)
    assert (basis.T @ basis - torch.eye(columns)).abs().max() < 1e-12
    assert (tall - basis @ (basis.T @ tall)).abs().max() < 1e-11
    assert (tall * basis).sum(0).min() > 0  # each column points the way of its own
    moved = orthonormalize(basis + 1e-6 * matrix(columns + extra, columns, seed + 1))
    assert (moved - basis).abs().max() < 1e-4  # no column changed its sign


def test_a_rank_deficient_matrix_still_gives_an_orthonormal_basis():
    basis = orthonormalize(torch.ones(6, 3, dtype=torch.float64))
    assert (basis.T @ basis - torch.eye(3)).abs().max() < 1e-12
    with pytest.raises(ValueError, match="columns"):
        orthonormalize(torch.ones(2, 3))
