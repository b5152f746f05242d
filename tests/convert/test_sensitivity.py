"""Worths of output features against plain autograd, and the ranks that follow from them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import thintune as tt
from thintune.convert.ranks import choose_ranks
from thintune.convert.sensitivity import output_worths
from thintune.convert.walk import chains
from thintune.convert.weights import DenseLayers
from thintune.errors import ConversionError


def dense_layers(model, leave=("head",)):
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in leave}
    return DenseLayers(model, layers, None)


def test_with_one_feature_the_worth_is_the_squared_gradient(inputs):
    model = nn.Sequential(nn.Linear(24, 7), nn.Tanh(), nn.Linear(7, 1), nn.Linear(1, 5)).double()
    batches = [inputs(30), inputs(20)]
    worths = output_worths(model, dense_layers(model, ["3"]), batches, {})
    hidden = torch.cat(batches) @ model[0].weight.T + model[0].bias
    features = model[2](torch.tanh(hidden)).detach()
    scale = features.std(correction=0)
    gradient = (1 - torch.tanh(hidden).square()) * model[2].weight / scale
    assert torch.allclose(worths["0"], gradient.square().sum(0))
    assert torch.allclose(worths["2"], 50 / scale.square().reshape(1))


@pytest.mark.parametrize("frozen", [False, True])
def test_block_by_block_is_what_the_whole_model_gives(make, inputs, frozen):
    model, batches = make(depth=3).requires_grad_(not frozen), [inputs(6, 5), inputs(4, 5)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = dense_layers(model)
    found = chains(model, dense, batches[0])
    assert found
    along, whole = output_worths(model, dense, batches, found), output_worths(model, dense, batches, {})
    assert along.keys() == whole.keys() == dense.layers.keys()
    assert all(torch.allclose(along[name], whole[name], rtol=1e-10) and bool((along[name] > 0).any()) for name in along)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad == (not frozen) for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.is_grad_enabled() and model.training


def test_without_a_dense_head_the_output_is_what_counts(make, inputs):
    model = make()
    dense = dense_layers(model, [])
    worths = output_worths(model, dense, [inputs(40)], chains(model, dense, inputs(40)))
    assert set(worths) == set(dense.layers) and bool((worths["head"] > 0).all())


def test_a_layer_that_nothing_depends_on_is_worth_nothing(inputs):
    class Side(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.side, self.head = nn.Linear(24, 6), nn.Linear(24, 6), nn.Linear(6, 3)

        def forward(self, x):
            self.side(x)
            return self.head(self.used(x))

    model = Side().double()
    worths = output_worths(model, dense_layers(model), [inputs(30)], {})
    assert not worths["side"].any() and bool(worths["used"].all())


def test_a_model_that_returns_no_tensor_is_refused(inputs):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(24, 6).double()

        def forward(self, x):
            return {"logits": self.fc(x)}

    model = Named()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConversionError, match="returns a tensor"):
        tt.convert_(model, tt.ThinConfig(kept=0.5, rank_allocation="sensitivity"), calibration=[inputs(30)])
    assert torch.equal(model.fc.weight, before["fc.weight"])


def test_ranks_are_those_of_the_least_loss_that_trying_all_would_find():
    layers = {"a": nn.Linear(9, 14), "b": nn.Linear(14, 9), "c": nn.Linear(10, 12)}
    spectra = {n: 3.0**k * torch.rand(9, dtype=torch.float64).sort(descending=True)[0] for k, n in enumerate(layers)}
    limits = {"a": 5, "b": 5, "c": 5}
    config = tt.ThinConfig(kept=0.5, rank_allocation="sensitivity")
    found = choose_ranks(layers, lambda: spectra, config, cap=True)
    sizes = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
    budget = 0.5 * sum(layer.weight.numel() for layer in layers.values())
    best = min(
        sum(float(spectra[n][k:].sum()) for n, k in zip(layers, ranks, strict=True))
        for ranks in itertools.product(*(range(1, limits[n] + 1) for n in layers))
        if sum(k * sizes[n] for n, k in zip(layers, ranks, strict=True)) <= budget
    )
    assert sum(k * sizes[n] for n, k in found.items()) <= budget
    assert sum(float(spectra[n][k:].sum()) for n, k in found.items()) == pytest.approx(best)
    assert found["c"] > found["a"]


def test_a_share_below_rank_one_is_refused_for_the_least_loss_too(net, inputs):
    with pytest.raises(ConversionError, match="rank 1 everywhere"):
        tt.convert_(net, tt.ThinConfig(kept=0.01, rank_allocation="sensitivity"), calibration=[inputs(40)])


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
def test_the_least_loss_keeps_within_the_share_and_comes_near(make, inputs, kept):
    config = tt.ThinConfig(kept=kept, rank_allocation="sensitivity", output_weighting="gradient")
    report = tt.convert_(make(depth=4), config, calibration=[inputs(60)])
    assert kept - 0.05 < report.kept_weight_fraction <= kept


@pytest.mark.parametrize("share", [{"kept": 0.5}, {"rank": 2}])
def test_a_model_none_of_whose_layers_is_called_is_an_error(inputs, share):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(24, 6)

        def forward(self, x):
            return x * 2

    config = tt.ThinConfig(**share, rank_allocation="sensitivity", output_weighting="gradient")
    with pytest.raises(ConversionError, match=r"none of fc is called"):
        tt.convert_(Idle(), config, calibration=[inputs(30)])
