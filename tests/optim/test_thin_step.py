import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from thintune.linalg import orthonormalize
from thintune.nn import FactorLinear, SubspaceLinear, TuckerCompressor
from thintune.optim import ThinStep
from thintune.optim.step import tangent_gradient

I, O = 6, 8  # noqa: E741 - the letters of the equations


def subspace(rank=I, r=I, seed=0):
    torch.manual_seed(seed)
    layer = SubspaceLinear(I, O, rank, activation_rank=r).double()
    layer.start_(orthonormalize(torch.randn(I, r).double()))
    layer.set_(orthonormalize(torch.randn(O, rank).double()), torch.randn(rank, I).double(), torch.randn(O).double())
    return layer


def dense_twin(layer):
    twin = nn.Linear(I, O).double()
    with torch.no_grad():
        twin.weight.copy_(layer.left @ layer.right)
        twin.bias.copy_(layer.bias)
    return twin


def parameters(layer):
    return [p for p in layer.parameters() if p.requires_grad]


def weight(layer):
    return (layer.left @ layer.right).detach()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_at_full_rank_sgd_equals_dense_sgd_also_across_a_basis_refresh(momentum):
    layer = subspace()
    twin = dense_twin(layer)
    ours = torch.optim.SGD(parameters(layer), lr=0.05, momentum=momentum)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=momentum)
    step = ThinStep(layer, ours, refresh_every=3)
    first = layer.basis.clone()
    for i in range(10):
        x = torch.randn(5, 3, I, generator=torch.Generator().manual_seed(i)).double()
        for model, optimizer in ((layer, ours), (twin, theirs)):
            model(x).tanh().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert (weight(layer) - twin.weight).abs().max() < 1e-9
        assert (layer.bias - twin.bias).abs().max() < 1e-9
        assert not layer.update.any()
    assert step.steps == 10
    assert (layer.basis - first).abs().max() > 1e-3  # the refresh did happen


def test_micro_batches_add_up_exactly_and_the_norm_is_the_dense_one():
    layer, x = subspace(), torch.randn(7, 4, I).double()
    layer(x).square().sum().backward()
    whole = layer.update.grad.clone()
    twin = dense_twin(layer)
    twin(x).square().sum().backward()
    assert abs(whole.norm() - twin.weight.grad.norm()) < 1e-9 * whole.norm()
    layer.zero_grad()
    for part in x.split([3, 3, 1]):
        layer(part).square().sum().backward()
    assert (layer.update.grad - whole).abs().max() < 1e-11


def test_adamw_learns_and_its_decay_is_that_of_the_weight():
    layer = subspace(rank=4, r=3)
    optimizer = torch.optim.AdamW(parameters(layer), lr=0.01, weight_decay=0.5)
    ThinStep(layer, optimizer, refresh_every=4)
    before = weight(layer)
    layer.update.grad = torch.zeros_like(layer.update)
    optimizer.step()
    assert (weight(layer) - (1 - 0.01 * 0.5) * before).abs().max() < 1e-12
    x, target = torch.randn(40, I).double(), torch.randn(40, O).double()
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_an_adaptive_first_step_has_the_length_of_the_dense_one():
    layer = subspace(r=2)
    twin = dense_twin(layer)
    before = weight(layer)
    for model in (layer, twin):
        optimizer = torch.optim.AdamW(parameters(model), lr=1e-3, weight_decay=0.0, eps=1e-30)
        if model is layer:
            ThinStep(model, optimizer)
        model(torch.randn(30, I).double()).square().sum().backward()
        optimizer.step()
    # every coordinate moves by the rate: O r coordinates lengthened by sqrt(I / r) against O I coordinates
    assert abs((weight(layer) - before).norm() - (twin.weight - before).norm()) < 1e-6 * before.norm()


def test_a_scheduler_and_clipping_reach_the_thin_layer():
    layer = subspace(rank=4, r=3)
    optimizer = torch.optim.SGD(parameters(layer), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 if t == 0 else 0.0)
    ThinStep(layer, optimizer)
    moves = []
    for _ in range(2):
        before = weight(layer)
        layer(torch.randn(9, I).double()).square().sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters(layer), 1e-3)
        assert norm > 1e-3
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        moves.append(float((weight(layer) - before).norm()))
    assert 0 < moves[0] <= 1e-3 * (1 + 1e-6) and moves[1] < 1e-14


@pytest.mark.parametrize("kind", ["subspace", "tucker"])
def test_the_warm_start_advances_once_a_step_under_recomputation(kind):
    torch.manual_seed(1)
    if kind == "subspace":
        layer = subspace(rank=4, r=3)
    else:
        layer = FactorLinear(I, O, 4, compressor=TuckerCompressor((3, 5, I), (2, 3, 3))).double()
        layer.set_(orthonormalize(torch.randn(O, 4).double()), torch.randn(4, I).double(), torch.zeros(O).double())
    twin = copy.deepcopy(layer)
    for model, recompute in ((layer, False), (twin, True)):
        optimizer = torch.optim.SGD(parameters(model), lr=0.01, momentum=0.9)
        ThinStep(model, optimizer, refresh_every=2)
        for i in range(5):
            for j in range(2):
                x = torch.randn(3, 5, I, generator=torch.Generator().manual_seed(10 * i + j)).double()
                y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
                y.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), b in zip(layer.state_dict().items(), twin.state_dict().values(), strict=True):
        assert (a - b).abs().max() < 1e-11, name


def test_a_compressor_starts_every_micro_batch_from_the_same_bases():
    compressor = TuckerCompressor((3, 5, I), (2, 3, 3)).double()
    x, other = torch.randn(3, 5, I).double(), torch.randn(3, 5, I).double()
    compressor.start_(compressor(x)[1])
    first = compressor(x)[0]
    compressor(other)
    assert torch.equal(compressor(x)[0], first)
    compressor(other)
    compressor.advance_()
    assert not torch.equal(compressor(x)[0], first)
    assert compressor(x[:2])[0].shape[0] == 2  # a short last batch


def test_the_tangent_gradient_is_the_turning_part_of_the_dense_step():
    left, right, d = orthonormalize(torch.randn(O, 3).double()), torch.randn(3, I).double(), torch.randn(O, I).double()
    found = tangent_gradient(left, right, d @ right.T)
    expected = (d - left @ (left.T @ d)) @ torch.linalg.pinv(right)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (left.T @ found).abs().max() < 1e-6


def test_a_factor_step_is_the_tangent_step_and_keeps_left_orthonormal():
    torch.manual_seed(2)
    layer = FactorLinear(I, O, 3).double()
    layer.set_(orthonormalize(torch.randn(O, 3).double()), torch.randn(3, I).double(), torch.zeros(O).double())
    before, rate = weight(layer), 1e-6
    left, right = layer.left.detach().clone(), layer.right.detach().clone()
    optimizer = torch.optim.SGD(parameters(layer), lr=rate)
    ThinStep(layer, optimizer)
    x = torch.randn(20, I).double()
    y = layer(x)
    y.square().sum().backward()
    d = (2 * y.detach()).T @ x
    optimizer.step()
    v = orthonormalize(right.T)
    tangent = left @ (left.T @ d) + (d - left @ (left.T @ d)) @ v @ v.T
    assert ((weight(layer) - before) + rate * tangent).norm() < 1e-3 * rate * tangent.norm()
    assert (layer.left.T @ layer.left - torch.eye(3)).abs().max() < 1e-12


def test_removed_hooks_leave_the_optimizer_plain():
    layer = subspace(rank=4, r=3)
    optimizer = torch.optim.SGD(parameters(layer), lr=0.1)
    ThinStep(layer, optimizer).remove()
    layer(torch.randn(4, I).double()).square().sum().backward()
    optimizer.step()
    assert layer.update.any()
