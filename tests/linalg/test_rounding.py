"""Factors in bfloat16."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thintune.linalg import orthonormalize, rounded_subspace_step_, stochastic_round_, warm_subspace_step

BF16 = torch.bfloat16


def factors(out_features=40, in_features=30, rank=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = orthonormalize(torch.randn(out_features, rank, generator=generator))
    right = torch.randn(rank, in_features, generator=generator)
    basis = orthonormalize(torch.randn(in_features, 4, generator=generator))
    return left.contiguous().to(BF16), right.to(BF16), torch.randn(out_features, 4, generator=generator), basis


@settings(max_examples=50, deadline=None)
@given(value=st.floats(-(2.0**99), 2.0**99, width=32), seed=st.integers(0, 99))
def test_a_value_goes_to_one_of_its_two_neighbours(value, seed):
    torch.manual_seed(seed)
    source = torch.full((7,), value)
    found = stochastic_round_(torch.empty(7, dtype=BF16), source).float()
    below = (source.view(torch.int32) & -(1 << 16)).view(torch.float32)
    above = ((source.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    assert bool(((found == below) | (found == above)).all())


def test_what_bfloat16_holds_stays_and_the_mean_is_exact():
    torch.manual_seed(0)
    held = torch.randn(1000).to(BF16)
    assert torch.equal(stochastic_round_(torch.empty_like(held), held.float()), held)
    value = torch.full((200_000,), 1.0 + 1e-3)  # neighbours 1 and 1.0078
    rounded = stochastic_round_(torch.empty_like(value, dtype=BF16), value).float()
    assert abs(float(rounded.mean()) - float(value[0])) < 5e-5
    assert float(value[0].to(BF16)) == 1.0  # rounding to the nearest loses it


def test_without_a_step_nothing_changes():
    left, right, step, basis = factors()
    before = left.clone(), right.clone()
    rounded_subspace_step_(left, right, torch.zeros_like(step), basis)
    assert torch.equal(left, before[0]) and torch.equal(right, before[1])


@pytest.mark.parametrize("out_features", [40, 6])
def test_the_mean_of_many_roundings_is_the_exact_step(out_features):
    left, right, step, basis = factors(out_features=out_features)
    step *= 1e-3
    old = left.float() @ right.float()
    exact_left = torch.linalg.qr(left.float())[0]
    exact = torch.matmul(*warm_subspace_step(exact_left, exact_left.T @ old, step, basis))
    torch.manual_seed(0)
    total = torch.zeros_like(old)
    for _ in range(400):
        one, other = left.clone(), right.clone()
        rounded_subspace_step_(one, other, step, basis)
        total += one.float() @ other.float()
    moved = exact - old
    assert (total / 400 - exact).norm() < 0.25 * moved.norm()
    assert (old.to(BF16).float() - old).norm() > moved.norm()  # the step is far below what bfloat16 resolves


def test_small_steps_add_up_over_many_and_columns_stay_near_orthonormal():
    left, right, step, basis = factors()
    old = left.float() @ right.float()
    torch.manual_seed(0)
    one, other = torch.linalg.qr(left.float())[0], right.float()
    other = one.T @ old
    for _ in range(300):
        rounded_subspace_step_(left, right, 2e-4 * step, basis)
        one, other = warm_subspace_step(one, other, 2e-4 * step, basis)
    moved, found = one @ other - old, left.float() @ right.float() - old
    assert (found - moved).norm() < 0.03 * old.norm()  # a rounding is 0.4 % of a value, 300 of them no more than this
    assert (found * moved).sum() > 0.7 * found.norm() * moved.norm()
    assert (left.float().T @ left.float() - torch.eye(6)).abs().max() < 0.25


def test_decay_alone_shrinks_the_weight_on_average():
    left, right, step, basis = factors()
    old = left.float() @ right.float()
    for _ in range(200):
        rounded_subspace_step_(left, right, torch.zeros_like(step), basis, decay=1e-3)
    ratio = float(((left.float() @ right.float()) * old).sum() / old.square().sum())
    assert abs(ratio - 0.999**200) < 0.01
