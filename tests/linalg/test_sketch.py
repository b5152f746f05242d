"""Directions found through products alone."""

import pytest
import torch

from thintune.linalg import leading_directions, orthonormalize


def positive(n, decay, rank=None):
    torch.manual_seed(1)
    vectors = orthonormalize(torch.randn(n, n, dtype=torch.float64))
    values = decay ** torch.arange(n, dtype=torch.float64)
    if rank is not None:
        values[rank:] = 0
    return (vectors * values) @ vectors.T, vectors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_matrix_of_low_rank_is_found_exactly(dtype):
    matrix, vectors = positive(30, 0.7, rank=5)
    start = orthonormalize(torch.randn(30, 7, dtype=torch.float64))
    found = leading_directions(start.to(dtype), (matrix @ start).to(dtype), 5)
    assert found.dtype == dtype and found.shape == (30, 5)
    lost = vectors[:, :5] - found.double() @ (found.double().T @ vectors[:, :5])
    assert lost.norm() < (1e-10 if dtype == torch.float64 else 2e-3)
    assert (found.T @ found - torch.eye(5)).abs().max() < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("decay", [0.9, 0.7])
def test_a_wider_start_loses_less(decay):
    matrix, vectors = positive(40, decay)
    best = (vectors[:, :6].T @ matrix @ vectors[:, :6]).trace()
    held = []
    for width in (6, 9, 40):
        start = orthonormalize(torch.randn(40, width, dtype=torch.float64))
        found = leading_directions(start, matrix @ start, 6)
        held.append(float((found.T @ matrix @ found).trace() / best))
    assert held[0] < held[1] < held[2] <= 1 + 1e-12
    assert held[2] == pytest.approx(1, abs=1e-10)


def test_a_zero_matrix_gives_orthonormal_columns():
    start = orthonormalize(torch.randn(9, 4, dtype=torch.float64))
    assert torch.equal(leading_directions(start, torch.zeros(9, 4, dtype=torch.float64), 3), start[:, :3])
