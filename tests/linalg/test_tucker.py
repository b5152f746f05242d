import itertools

import pytest
import torch

from thintune.errors import ConfigError
from thintune.linalg import compress_warm, hosvd, mode_dot, mode_ranks, reconstruct, st_hosvd, unfold

SHAPES = [(7, 4), (5, 6, 4), (3, 5, 2, 6), (1, 4, 5)]


def tensor(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def smooth(shape):
    """A tensor of quickly falling mode spectra."""
    grids = torch.meshgrid(*(torch.linspace(0, 1, n, dtype=torch.float64) for n in shape), indexing="ij")
    return 1 / (1 + sum(g * (i + 1) for i, g in enumerate(grids)))


@pytest.mark.parametrize("shape", SHAPES)
def test_mode_products_equal_einsum_also_on_strided_tensors(shape):
    letters = "abcd"[: len(shape)]
    for x in (tensor(shape), tensor(shape[::-1]).permute(*range(len(shape) - 1, -1, -1))):
        for mode, size in enumerate(shape):
            matrix = tensor((3, size), mode)
            expected = torch.einsum(f"{letters},z{letters[mode]}->{letters.replace(letters[mode], 'z')}", x, matrix)
            assert (mode_dot(x, matrix, mode) - expected).abs().max() < 1e-12
            assert unfold(x, mode).shape == (size, x.numel() // size)
            assert torch.equal(unfold(x, mode)[1 % size], x.select(mode, 1 % size).flatten())


@pytest.mark.parametrize("shape", SHAPES)
def test_full_ranks_are_exact(shape):
    x = tensor(shape)
    for core, factors in (st_hosvd(x, shape), compress_warm(x, shape, [None] * len(shape))):
        assert (reconstruct(core, factors) - x).abs().max() < 1e-10
        for factor in factors:
            assert (factor.T @ factor - torch.eye(factor.shape[1])).abs().max() < 1e-12


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_the_error_is_bounded_by_the_discarded_tails(shape):
    x = tensor(shape)
    ranks = [max(1, n // 2) for n in shape]
    core, factors = st_hosvd(x, ranks)
    tails = sum(torch.linalg.svdvals(unfold(x, m))[r:].square().sum() for m, r in enumerate(ranks))
    error = (reconstruct(core, factors) - x).square().sum()
    assert 0 < error <= tails * (1 + 1e-9)
    # 3 directions of the last mode would need 3 columns; the shrunken others leave 2
    assert core.shape == {2: (3, 2), 3: (2, 3, 2), 4: (1, 2, 1, 2)}[len(shape)]


@pytest.mark.parametrize("shape", [(9, 6), (7, 8, 6), (4, 5, 3, 6)])
def test_a_warm_start_reaches_the_error_of_the_decomposition(shape):
    x = smooth(shape) + 1e-3 * tensor(shape)
    ranks = [2] * len(shape)
    best = (reconstruct(*st_hosvd(x, ranks)) - x).norm()
    start, errors = [None] * len(shape), []
    for _ in range(6):
        core, start = compress_warm(x, ranks, start)
        errors.append(float((reconstruct(core, start) - x).norm()))
    assert errors[-1] <= 1.05 * best


def test_a_warm_start_is_better_than_none():
    x = tensor((9, 8, 7))  # flat spectra: one iteration from nowhere does not find the leading directions
    ranks, start = (3, 3, 3), [None] * 3
    cold_core, cold = compress_warm(x, ranks, start)
    for _ in range(40):
        core, start = compress_warm(x, ranks, start)
    error = (reconstruct(core, start) - x).norm()
    assert error < (reconstruct(cold_core, cold) - x).norm() * 0.98
    assert error <= 1.02 * (reconstruct(*st_hosvd(x, ranks)) - x).norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_reconstruction_equals_einsum(shape):
    core = tensor([n + 1 for n in shape][::-1]).permute(*range(len(shape) - 1, -1, -1))
    factors = [tensor((n, n + 1), mode) for mode, n in enumerate(shape)]
    small, large = "abcd"[: len(shape)], "wxyz"[: len(shape)]
    terms = ",".join(b + a for a, b in zip(small, large, strict=True))
    expected = torch.einsum(f"{small},{terms}->{large}", core, *factors)
    assert (reconstruct(core, factors) - expected).abs().max() < 1e-11


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.4, 0.8, 0.99])
def test_ranks_by_explained_variance_are_those_of_the_unfoldings(shape, share):
    x = tensor(shape)
    expected = []
    for mode in range(len(shape)):
        variances = torch.linalg.svdvals(unfold(x, mode)).square()
        kept = variances.cumsum(0) / variances.sum()
        expected.append(1 + int((kept < share - 1e-12).sum()))
    assert mode_ranks(x, share) == tuple(expected)
    assert mode_ranks(x.transpose(0, -1), share) == (expected[-1], *expected[1:-1], expected[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.4, 0.8, 0.99])
def test_the_hosvd_projects_every_mode_on_its_leading_singular_vectors(shape, share):
    x = tensor(shape)
    core, factors = hosvd(x, share)
    assert core.shape == mode_ranks(x, share)
    projected = x
    for mode, factor in enumerate(factors):
        u = torch.linalg.svd(unfold(x, mode), full_matrices=False)[0][:, : factor.shape[1]]
        assert (factor @ factor.T - u @ u.T).abs().max() < 1e-10  # of the tensor itself, not of what is left of it
        projected = mode_dot(projected, u @ u.T, mode)
    found = reconstruct(core, factors)
    assert (found - projected).abs().max() < 1e-10
    lost = (found - x).square().sum() / x.square().sum()
    assert lost <= len(shape) * (1 - share) + 1e-12  # each mode discards at most its own share


@pytest.mark.parametrize("shape", SHAPES)
def test_an_hosvd_of_the_whole_variance_is_exact(shape):
    x = tensor(shape)
    assert (reconstruct(*hosvd(x, 1.0)) - x).abs().max() < 1e-10


def test_zeros_have_rank_one_and_a_finite_form():
    x = torch.zeros(4, 3, 5, dtype=torch.float64)
    assert mode_ranks(x, 0.9) == (1, 1, 1)
    assert hosvd(x, 0.9)[0].shape == (1, 1, 1) and not reconstruct(*hosvd(x, 0.9)).any()
    core, factors = compress_warm(x, (2, 2, 2), [None] * 3)
    assert not reconstruct(core, factors).any()
    assert all((f.T @ f - torch.eye(2)).abs().max() < 1e-12 for f in factors)


def test_a_start_of_another_shape_is_set_aside():
    x = smooth((5, 6, 4))
    other = compress_warm(smooth((3, 6, 4)), (2, 2, 2), [None] * 3)[1]
    core, factors = compress_warm(x, (2, 2, 2), other)
    assert [f.shape for f in factors] == [(5, 2), (6, 2), (4, 2)]
    assert (reconstruct(core, factors) - x).norm() < 0.1 * x.norm()


def test_ranks_by_explained_variance_grow_with_it():
    x = smooth((7, 8, 6))
    shares = (0.5, 0.9, 0.999, 1.0)
    ranks = [mode_ranks(x, share) for share in shares]
    assert all(a <= b for less, more in itertools.pairwise(ranks) for a, b in zip(less, more, strict=True))
    assert ranks[0] == (1, 1, 1)
    with pytest.raises(ConfigError):
        mode_ranks(x, 0.0)


def test_ranks_above_what_a_mode_can_carry_are_clipped():
    core, factors = st_hosvd(tensor((2, 9)), (5, 9))
    assert core.shape == (2, 2) and factors[1].shape == (9, 2)
