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


def subspace(rank=I, r=I, seed=0, inputs=I, outputs=O):
    torch.manual_seed(seed)
    layer = SubspaceLinear(inputs, outputs, rank, activation_rank=r).double()
    layer.start_(orthonormalize(torch.randn(inputs, r).double()))
    right, bias = torch.randn(rank, inputs).double(), torch.randn(outputs).double()
    layer.set_(orthonormalize(torch.randn(outputs, rank).double()), right, bias)
    return layer


def dense_twin(layer):
    twin = nn.Linear(layer.in_features, layer.out_features).double()
    with torch.no_grad():
        twin.weight.copy_(layer.left @ layer.right)
        twin.bias.copy_(layer.bias)
    return twin


def parameters(layer):
    return [p for p in layer.parameters() if p.requires_grad]


def weight(layer):
    return (layer.left @ layer.right).detach()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("inputs", "outputs"), [(I, O), (O, I)])
def test_at_full_rank_sgd_equals_dense_sgd_also_across_a_basis_refresh(momentum, inputs, outputs):
    layer = subspace(rank=min(inputs, outputs), r=inputs, inputs=inputs, outputs=outputs)
    twin = dense_twin(layer)
    ours = torch.optim.SGD(parameters(layer), lr=0.05, momentum=momentum)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=momentum)
    step = ThinStep(layer, ours, refresh_every=3)
    first = layer.basis.clone()
    for i in range(10):
        x = torch.randn(5, 3, inputs, generator=torch.Generator().manual_seed(i)).double()
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
    norms = [torch.nn.utils.clip_grad_norm_(parameters(model), 0.5) for model in (layer, twin)]
    assert abs(norms[0] - norms[1]) < 1e-9 * norms[1]
    assert (layer.update.grad @ layer.basis.T - twin.weight.grad).abs().max() < 1e-9
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


def test_a_step_takes_over_the_bases_of_its_last_micro_batch():
    torch.manual_seed(5)
    compressor = TuckerCompressor((3, 5, I), (2, 3, 3)).double()
    layer = FactorLinear(I, O, 4, compressor=compressor).double()
    layer.set_(orthonormalize(torch.randn(O, 4).double()), torch.randn(4, I).double(), torch.zeros(O).double())
    compressor.start_(compressor(torch.randn(3, 5, I).double())[1])
    optimizer = torch.optim.SGD(parameters(layer), lr=0.01)
    ThinStep(layer, optimizer)
    for _ in range(3):
        before = compressor.factor2.clone()
        for _ in range(2):
            x = torch.randn(3, 5, I).double()
            layer(x).square().sum().backward()
            assert torch.equal(compressor.factor2, before)
        expected = compressor(x)[1]
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(compressor.factor1, expected[1]) and torch.equal(compressor.factor2, expected[2])
        assert not torch.equal(compressor.factor2, before)


def test_the_basis_moves_every_so_many_steps_and_at_no_other():
    layer = subspace(rank=4, r=3)
    optimizer = torch.optim.SGD(parameters(layer), lr=1e-3)
    step = ThinStep(layer, optimizer, refresh_every=3)
    step.restore_(1)
    moved = []
    for _ in range(6):
        before = layer.basis.clone()
        layer(torch.randn(20, I).double()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved.append(not torch.equal(layer.basis, before))
    assert moved == [False, True, False, False, True, False]


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


def test_the_step_ends_with_the_product_that_the_optimizer_left():
    torch.manual_seed(4)
    layer = FactorLinear(I, O, 3).double()
    layer.set_(orthonormalize(torch.randn(O, 3).double()), torch.randn(3, I).double(), torch.zeros(O).double())
    optimizer = torch.optim.AdamW(parameters(layer), lr=0.3)
    stepped = []
    optimizer.register_step_post_hook(lambda *_: stepped.append((layer.left.detach().clone(), weight(layer))))
    ThinStep(layer, optimizer)
    for _ in range(5):
        layer(torch.randn(20, I).double()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for left, product in stepped[-1:]:
        assert (left.T @ left - torch.eye(3)).abs().max() > 1e-2  # the optimizer itself does not keep it so
        assert (weight(layer) - product).abs().max() < 1e-12 * product.abs().max() * 10
    assert (layer.left.T @ layer.left - torch.eye(3)).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["subspace", "factor", "tucker"])
def test_a_zero_weight_learns(kind):
    torch.manual_seed(3)
    if kind == "subspace":
        layer = subspace(rank=3, r=4)
    else:
        form = TuckerCompressor((6, 5, I), (2, 3, 3)) if kind == "tucker" else None
        layer = FactorLinear(I, O, 3, compressor=form).double()
    zeros = torch.zeros(3, I).double()
    layer.set_(orthonormalize(torch.randn(O, 3).double()), zeros, torch.zeros(O).double())
    optimizer = torch.optim.SGD(parameters(layer), lr=0.02)
    ThinStep(layer, optimizer)
    x = torch.randn(6, 5, I).double()
    target, losses = x @ torch.randn(I, O).double(), []
    for _ in range(40):
        loss = (layer(x) - target).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_a_layer_that_took_no_part_stays_as_it_was():
    layers = nn.ModuleList([subspace(rank=4, r=3), subspace(rank=4, r=3, seed=1)])
    optimizer = torch.optim.AdamW(parameters(layers), lr=0.1, weight_decay=0.5)
    ThinStep(layers, optimizer, refresh_every=2)
    before = {name: t.clone() for name, t in layers[1].state_dict().items()}
    for _ in range(4):
        layers[0](torch.randn(9, I).double()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(t, before[name]) for name, t in layers[1].state_dict().items())


def test_removed_hooks_leave_the_optimizer_plain():
    layer = subspace(rank=4, r=3)
    optimizer = torch.optim.SGD(parameters(layer), lr=0.1)
    ThinStep(layer, optimizer).remove()
    layer(torch.randn(4, I).double()).square().sum().backward()
    optimizer.step()
    assert layer.update.any()


def test_layers_take_turns_with_their_basis():
    layers = nn.Sequential(*(SubspaceLinear(6, 6, 3, activation_rank=2) for _ in range(5)))
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    ThinStep(layers, optimizer, refresh_every=5)
    seen = []
    for _ in range(10):
        seen.append([place for place, layer in enumerate(layers) if layer.capturing])
        layers(torch.randn(8, 6)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(len(turn) == 1 for turn in seen)
    assert sorted(turn[0] for turn in seen[:5]) == sorted(turn[0] for turn in seen[5:]) == list(range(5))
