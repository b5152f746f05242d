"""The layers themselves: refusals, what they are outside training, and when a warm start advances."""

import pytest
import torch

from thintune.errors import ConfigError
from thintune.linalg import hosvd, mode_ranks, orthonormalize, reconstruct
from thintune.measure import SavedActivations
from thintune.nn import CompressedLinear, FactorLinear, HosvdCompressor, SubspaceLinear, ThinLinear, TuckerCompressor

I, O, K = 6, 8, 3  # noqa: E741 - the letters of the equations


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def filled(layer):
    layer.set_(orthonormalize(rand(O, layer.rank)), rand(layer.rank, I), rand(O))
    return layer


@pytest.mark.parametrize("rank", [0, -1, 7])
def test_a_rank_out_of_range_is_refused_with_the_limit(rank):
    with pytest.raises(ConfigError, match=r"in_features=6, out_features=8.*rank <= 6"):
        ThinLinear(I, O, rank)


def test_training_leaves_frozen_factors_without_a_gradient():
    layer = filled(SubspaceLinear(I, O, K, activation_rank=4, dtype=torch.float64))
    layer(rand(5, I)).sum().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {"update", "bias"}
    assert layer.update.shape == (O, 4) and layer.training_only() == {"update", "basis"}


@pytest.mark.parametrize("rank", [2, 9])
def test_an_activation_rank_above_the_input_is_the_input(rank):
    layer = SubspaceLinear(I, O, K, activation_rank=rank)
    assert layer.update.shape == (O, min(rank, I)) and layer.basis.shape == (I, min(rank, I))


def test_every_layer_is_the_same_plain_map_in_and_outside_training():
    x = rand(4, 5, I)
    form = TuckerCompressor((4, 5, I), (2, 2, 2))
    thin = [
        SubspaceLinear(I, O, K, activation_rank=2, dtype=torch.float64),
        FactorLinear(I, O, K, dtype=torch.float64),
        FactorLinear(I, O, K, compressor=form, dtype=torch.float64),
    ]
    for layer in map(filled, thin):
        with torch.no_grad():
            plain = layer(x)
        assert (layer(x) - plain).abs().max() < 1e-12
        assert (plain - x @ (layer.left @ layer.right).T - layer.bias).abs().max() < 1e-12
    dense = CompressedLinear(I, O, compressor=form, dtype=torch.float64)
    assert (dense(x) - torch.nn.functional.linear(x, dense.weight, dense.bias)).abs().max() < 1e-12


def test_evaluation_leaves_the_warm_start_alone():
    form = TuckerCompressor((4, 5, I), (2, 2, 2)).double()
    layer = filled(FactorLinear(I, O, K, compressor=form, dtype=torch.float64))
    form.start_(form(rand(4, 5, I))[1])
    before = {name: t.clone() for name, t in form.state_dict().items()}
    with torch.no_grad():
        layer(rand(4, 5, I, seed=7))
    form.advance_()
    assert all(torch.equal(t, before[name]) for name, t in form.state_dict().items())


def test_a_short_last_batch_is_compressed_and_its_bases_are_taken_over():
    form = TuckerCompressor((4, 5, I), (3, 2, 2)).double()
    form.start_(form(rand(4, 5, I))[1])
    before = form.factor2.clone()
    x = torch.einsum("a,b,c->abc", rand(2), rand(5), rand(I, seed=1))  # rank one: compression is exact
    core, factors = form(x)
    assert core.shape == (2, 2, 2) and factors[0].shape == (2, 2)
    assert (reconstruct(core, factors) - x).abs().max() < 1e-10
    form.advance_()
    assert torch.equal(form.factor2, factors[2]) and not torch.equal(form.factor2, before)
    single = form(rand(1, 5, I))  # one image carries two directions of a mode at most where the others allow
    assert single[0].shape == (1, 2, 2)
    form.advance_()
    assert form.factor1.shape == (5, 2) and form.factor2.shape == (I, 2)


@pytest.mark.parametrize("shape", [(9, I), (4, 5, I), (2, 3, 4, I)])
def test_an_exact_decomposition_gives_the_gradient_of_the_truncated_input_anew_at_every_step(shape):
    layer = CompressedLinear(I, O, compressor=HosvdCompressor(0.7), dtype=torch.float64)
    assert not list(layer.buffers()) and layer.training_only() == set()
    seen = set()
    for seed, decay in ((0, 0.1), (1, 2.0)):  # a flat spectrum, then a steep one
        x = (rand(*shape, seed=seed) * torch.exp(-decay * torch.arange(I).double())).requires_grad_()
        kept = reconstruct(*hosvd(x.detach(), 0.7)).flatten(0, -2)
        assert (kept - x.flatten(0, -2)).abs().max() > 1e-3
        layer.zero_grad()
        y = layer(x)
        grad = rand(*y.shape, seed=seed)
        y.backward(grad)
        assert (y - torch.nn.functional.linear(x, layer.weight, layer.bias)).abs().max() < 1e-12
        assert (layer.weight.grad - grad.flatten(0, -2).T @ kept).abs().max() < 1e-10
        assert (x.grad - grad @ layer.weight).abs().max() < 1e-12
        assert (layer.bias.grad - grad.flatten(0, -2).sum(0)).abs().max() < 1e-12
        seen.add(mode_ranks(x.detach(), 0.7))
    assert len(seen) == 2


def test_an_exact_decomposition_is_all_that_is_kept():
    layer, x = CompressedLinear(I, O, compressor=HosvdCompressor(0.7)), rand(4, 5, I).float()
    ranks = mode_ranks(x, 0.7)
    with SavedActivations(exclude=layer) as saved:
        y = layer(x)
    factors = sum(n * r for n, r in zip(x.shape, ranks, strict=True))
    assert y.requires_grad and saved.bytes == 4 * (torch.Size(ranks).numel() + factors) < x.nbytes


def test_a_refresh_without_inputs_does_nothing_and_one_with_inputs_turns_towards_them():
    layer = filled(SubspaceLinear(I, O, K, activation_rank=2, dtype=torch.float64))
    assert layer.refresh_basis_() is None
    layer.capturing = True
    x, before = rand(50, I) * torch.tensor([1, 1, 1, 1, 30, 20]).double(), layer.basis.clone()
    for part in x.split([20, 30]):
        layer(part)
    turn = layer.refresh_basis_()
    assert (layer.basis - orthonormalize(x.T @ (x @ before))).abs().max() < 1e-10
    assert (turn - before.T @ layer.basis).abs().max() < 1e-12
    assert (x @ layer.basis).norm() > 2 * (x @ before).norm()
    assert layer.refresh_basis_() is None
