"""A frozen thin layer and its adapter: what it maps, keeps and becomes."""

import copy

import pytest
import torch
from torch import nn

import thintune as tt
from thintune.linalg import orthonormalize
from thintune.measure import SavedActivations
from thintune.nn import ThinLinear
from thintune.nn.adapter import AdaptedLinear

I, O, K, R, ALPHA = 24, 30, 4, 3, 5.0  # noqa: E741 - the letters of the equations


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def adapted(rank=R, bias=True, trained=True):
    base = ThinLinear(I, O, K, bias, dtype=torch.float64)
    base.set_(orthonormalize(rand(O, K)), rand(K, I), rand(O) if bias else None)
    layer = AdaptedLinear(base, rank, ALPHA)
    if trained:
        nn.init.normal_(layer.up)
    return layer


def product(layer):
    return layer.base.left @ layer.base.right + ALPHA / layer.rank * layer.up @ layer.down


def test_it_starts_as_its_base_and_trains_the_adapter_alone():
    layer, x = adapted(trained=False), rand(4, 5, I)
    assert torch.equal(layer(x), layer.base(x)) and layer.down.abs().max() <= I**-0.5
    layer(x).square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"down", "up"}
    assert layer.up.grad.abs().max() > 0


def test_outputs_and_gradients_are_those_of_the_summed_weight():
    layer, x = adapted(), rand(4, 5, I).requires_grad_()
    grad = rand(4, 5, O)
    y = layer(x)
    y.backward(grad)
    weight = product(layer)
    assert (y - x @ weight.T - layer.bias).abs().max() < 1e-10
    assert (x.grad - grad @ weight).abs().max() < 1e-10
    d = grad.flatten(0, 1).T @ x.detach().flatten(0, 1)
    assert (layer.up.grad - ALPHA / R * d @ layer.down.T).abs().max() < 1e-10
    assert (layer.down.grad - ALPHA / R * layer.up.T @ d).abs().max() < 1e-10


def test_it_keeps_its_input_and_the_narrow_product():
    layer, x = adapted(), rand(4, 5, I)
    with SavedActivations(exclude=layer) as saved:
        y = layer(x)
    assert y.requires_grad and saved.bytes == 8 * 4 * 5 * (I + R)


@pytest.mark.parametrize(("rank", "kind"), [(R, ThinLinear), (12, nn.Linear)])
@pytest.mark.parametrize("bias", [True, False])
def test_merged_it_is_thin_or_dense_whichever_is_smaller(rank, kind, bias):
    layer, x = adapted(rank, bias).eval(), rand(4, 5, I)
    merged = layer.merged()
    assert type(merged) is kind and not merged.training and (merged.bias is not None) == bias
    assert (merged(x) - layer(x)).abs().max() < 1e-10
    weight = {n: p for n, p in merged.named_parameters() if n != "bias"}
    assert sum(p.numel() for p in weight.values()) == layer.kept_elements
    assert kind is nn.Linear or merged.rank == K + R


def test_merging_a_model_or_saving_it_unmerged_loses_no_adapter(tmp_path):
    model = nn.Sequential(adapted(), nn.Linear(O, 3).double()).eval()
    x = rand(4, I)
    expected = model(x)
    assert (tt.merge_(copy.deepcopy(model))(x) - expected).abs().max() < 1e-10
    tt.save_checkpoint(model, tmp_path)
    with pytest.raises(tt.errors.CheckpointError, match=r"0\.base"):
        tt.load_checkpoint_(nn.Sequential(nn.Linear(I, O), nn.Linear(O, 3)).double(), tmp_path)
