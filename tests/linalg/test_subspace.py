import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from thintune.linalg import (
    orthonormalize,
    subspace_iteration,
    truncated_svd,
    warm_subspace_step,
    warm_subspace_step_,
    warm_subspace_step_reference,
)


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_iteration(weight, left):
    """The fault: the new basis is paired with coordinates taken in the old one."""
    right = left.T @ weight
    new, _ = torch.linalg.qr(weight @ (weight.T @ left))
    return new, right


def test_the_factor_lives_in_the_new_basis_while_a_naive_version_flips_signs():
    weight = matrix(12, 9, 3)
    left, right = truncated_svd(weight, rank=5)
    best = (left @ right - weight).norm() / weight.norm()
    naive_left, worst = left, 0.0
    for _ in range(4):
        left, right = subspace_iteration(weight, left)
        assert abs((left @ right - weight).norm() / weight.norm() - best) < 1e-10
        naive_left, naive_right = naive_iteration(weight, naive_left)
        worst = max(worst, float((naive_left @ naive_right - weight).norm() / weight.norm()))
    assert worst > 1.0


@given(
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(0, 99),
    st.sampled_from([0, 1e-3, 0.3, 3.0, 1e3]),
    st.sampled_from(["smallest", "one", "between"]),
    st.data(),
)
@settings(deadline=None, max_examples=200)
def test_the_exact_step_equals_forming_the_weight_and_iterating_once(rows, columns, r, seed, size, kind, data):
    limit = min(rows, columns)
    rank = {"smallest": limit, "one": 1}.get(kind) or data.draw(st.integers(1, limit))
    left, right = truncated_svd(matrix(rows, columns, seed), rank=rank)
    basis = orthonormalize(matrix(columns, min(r, columns), seed + 1))
    step = size * matrix(rows, basis.shape[1], seed + 2)
    weight = left @ right + step @ basis.T
    # the iteration itself magnifies rounding by the condition of what it orthonormalises; both forms suffer alike
    assume(torch.linalg.cond(weight @ (weight.T @ left)) < 1e6)
    new_left, new_right = warm_subspace_step(left, right, step, basis)
    expected_left, expected_right = warm_subspace_step_reference(left, right, step, basis)
    expected = expected_left @ expected_right
    assert (new_left.T @ new_left - torch.eye(rank)).abs().max() < 1e-12
    assert (new_left @ new_right - expected).norm() < 1e-10 * expected.norm()


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_weight_learns_as_the_reference_does(rank, dtype):
    left, right = orthonormalize(matrix(9, rank, 0)).to(dtype), torch.zeros(rank, 7, dtype=dtype)
    basis, step = orthonormalize(matrix(7, 4, 1)).to(dtype), matrix(9, 4, 2).to(dtype)
    new_left, new_right = warm_subspace_step(left, right, step, basis)
    expected_left, expected_right = warm_subspace_step_reference(left, right, step, basis)
    expected, bound = expected_left @ expected_right, 1e-5 if dtype == torch.float32 else 1e-12
    assert (new_left.T @ new_left - torch.eye(rank)).abs().max() < bound
    assert (new_left @ new_right - expected).norm() < bound * expected.norm()


def test_a_step_that_cancels_the_weight_leaves_finite_factors_of_zero():
    left, right = orthonormalize(matrix(5, 1, 0)), torch.eye(1, 7, dtype=torch.float64)
    new_left, new_right = warm_subspace_step(left, right, -left, torch.eye(7, 1, dtype=torch.float64))
    assert (new_left.T @ new_left - 1).abs().max() < 1e-12
    assert new_right.abs().max() < 1e-15


def test_a_dead_direction_is_put_to_use():
    left, right = truncated_svd(matrix(9, 7, 0), rank=3)
    right[1] = 0
    basis, step = orthonormalize(matrix(7, 4, 1)), 0.1 * matrix(9, 4, 2)
    weight = left @ right + step @ basis.T
    new_left, new_right = warm_subspace_step(left, right, step, basis)
    expected_left, expected_right = warm_subspace_step_reference(left, right, step, basis)
    assert torch.linalg.matrix_rank(new_left @ new_right) == 3
    assert (new_left @ new_right - expected_left @ expected_right).norm() < 1e-8 * weight.norm()


def test_a_zero_step_changes_nothing():
    left, right = truncated_svd(matrix(11, 7, 0), rank=3)
    new_left, new_right = warm_subspace_step(
        left, right, torch.zeros(11, 2, dtype=torch.float64), torch.eye(7, 2).double()
    )
    assert (new_left - left).abs().max() < 1e-12 and (new_right - right).abs().max() < 1e-12


def test_a_small_step_keeps_its_tangent_part():
    weight = matrix(13, 8, 1)
    left, right = truncated_svd(weight, rank=4)
    basis = orthonormalize(matrix(8, 3, 2))
    step = 1e-6 * matrix(13, 3, 3)
    new_left, new_right = warm_subspace_step(left, right, step, basis)
    d = step @ basis.T
    v = orthonormalize(right.T)
    tangent = left @ (left.T @ d) + (d @ v) @ v.T - left @ (left.T @ d @ v) @ v.T
    assert (new_left @ new_right - left @ right - tangent).norm() < 1e-4 * tangent.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_basis_stays_orthonormal_over_many_steps(dtype):
    left, right = (t.to(dtype) for t in truncated_svd(matrix(20, 15, 5), rank=6))
    basis = orthonormalize(matrix(15, 4, 6)).to(dtype)
    for i in range(300):
        left, right = warm_subspace_step(left, right, 0.01 * matrix(20, 4, i).to(dtype), basis)
    assert (left.T @ left - torch.eye(6, dtype=dtype)).abs().max() < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_of_every_size_equal_the_reference_and_leave_orthonormal_columns(size, dtype):
    left, right = truncated_svd(matrix(21, 15, 5), rank=6)
    basis, step = orthonormalize(matrix(15, 4, 6)), size * matrix(21, 4, 7)
    expected_left, expected_right = warm_subspace_step_reference(left, right, step, basis)
    moved, coordinates = warm_subspace_step(*(t.to(dtype) for t in (left, right, step, basis)))
    assert moved.dtype == dtype
    assert (moved.T @ moved - torch.eye(6)).abs().max() < (1e-5 if dtype == torch.float32 else 1e-12)
    expected = expected_left @ expected_right
    assert (moved.double() @ coordinates.double() - expected).norm() < (
        1e-3 if dtype == torch.float32 else 1e-9
    ) * expected.norm()


def test_the_step_is_taken_in_place_and_in_chunks():
    left, right = truncated_svd(matrix(1500, 1100, 3), rank=5)
    basis, step = orthonormalize(matrix(1100, 3, 4)), 0.2 * matrix(1500, 3, 5)
    expected_left, expected_right = warm_subspace_step_reference(left, right, step, basis)
    places = left.data_ptr(), right.data_ptr()
    warm_subspace_step_(left, right, step, basis)
    assert (left.data_ptr(), right.data_ptr()) == places
    expected = expected_left @ expected_right
    assert (left @ right - expected).norm() < 1e-10 * expected.norm()
