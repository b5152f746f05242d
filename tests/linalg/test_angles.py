"""Principal angles against subspaces whose angles are known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thintune.linalg import orthonormalize, principal_angles


@given(
    st.integers(0, 2**31),
    st.lists(st.sampled_from([0.0, 1e-9, 1e-5, 0.3, 1.0, 1.5707, torch.pi / 2]), min_size=1, max_size=4),
)
def test_angles_are_those_the_second_basis_was_turned_by(seed, turns):
    generator = torch.Generator().manual_seed(seed)
    q = len(turns)
    frame = orthonormalize(torch.randn(11, 2 * q, generator=generator, dtype=torch.float64))
    a, outside, angles = frame[:, :q], frame[:, q:], torch.tensor(sorted(turns), dtype=torch.float64)
    mix = orthonormalize(torch.randn(q, q, generator=generator, dtype=torch.float64))
    b = (a * angles.cos() + outside * angles.sin()) @ mix
    torch.testing.assert_close(principal_angles(a, b), angles, rtol=1e-9, atol=1e-12)


def test_a_smaller_subspace_inside_a_larger_one_has_no_angle():
    a = torch.eye(6, 3)
    assert principal_angles(a, a[:, 1:]).tolist() == [0.0, 0.0]
    assert principal_angles(a, torch.eye(6)[:, 4:]).tolist() == pytest.approx([torch.pi / 2] * 2)
