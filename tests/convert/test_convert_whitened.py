"""Method `svd_lora` as a conversion: frozen factors by whitening on the dense path."""

import copy
import json

import pytest
import torch
from torch import nn

import thintune as tt
from thintune.convert.structure import describe, rebuild_
from thintune.errors import ConversionError
from thintune.linalg import whitened_factors
from thintune.nn import ThinLinear
from thintune.nn.adapter import AdaptedLinear


def linears(net):
    return {n: m for n, m in net.named_modules() if isinstance(m, nn.Linear)}


def test_every_layer_gets_the_factors_of_the_inputs_of_the_dense_model(net, inputs):
    dense, x = copy.deepcopy(net).eval(), inputs(6, 9)
    seen = {}
    for name, layer in linears(dense).items():
        layer.register_forward_pre_hook(lambda _m, args, name=name: seen.update({name: args[0].flatten(0, -2)}))
    with torch.no_grad():
        dense(x)
    report = tt.convert_(net, tt.ThinConfig(rank=5, exclude_modules=["head"]), method="svd_lora", calibration=[x])
    converted = [layer.name for layer in report.converted]
    assert converted and "head" not in converted
    for name in converted:
        layer, old = net.get_submodule(name), dense.get_submodule(name)
        second = seen[name].T @ seen[name] / len(seen[name])
        left, right = whitened_factors(old.weight.detach(), second, rank=5)
        assert type(layer) is ThinLinear and layer.rank == 5
        assert (layer.left @ layer.right - left @ right).abs().max() < 1e-9
        assert layer.bias is old.bias or torch.equal(layer.bias, old.bias)
        assert not any(p.requires_grad for p in layer.parameters())


def test_the_kept_share_is_that_of_every_layer(net, inputs):
    report = tt.convert_(net, tt.ThinConfig(kept=0.5), method="svd_lora", calibration=[inputs(6, 9)])
    for layer in report.converted:
        o, i = layer.out_features, layer.in_features
        assert layer.rank == max(1, int(0.5 * o * i / (o + i)))
    assert report.kept_weight_fraction <= 0.5


def test_a_share_of_the_variance_and_a_full_rank(make, inputs):
    x = inputs(6, 9)
    dense = make().eval()
    full, part = copy.deepcopy(dense), copy.deepcopy(dense)
    share = tt.ThinConfig(explained_variance=0.9)
    ranks = {e.name: e.rank for e in tt.convert_(part, share, method="svd_lora", calibration=[x]).converted}
    assert len(set(ranks.values())) > 1
    whole = tt.ThinConfig(explained_variance=1.0)
    tt.convert_(full, whole, method="svd_lora", calibration=[x])
    with torch.no_grad():
        assert (full(x) - dense(x)).abs().max() < 1e-9


def test_what_cannot_be_done_is_refused_before_anything_changes(net, inputs):
    before = {n: type(m) for n, m in net.named_modules()}
    with pytest.raises(ConversionError, match="calibration"):
        tt.convert_(net, tt.ThinConfig(rank=2), method="svd_lora")
    with pytest.raises(ConversionError, match="rank 900 exceeds"):
        tt.convert_(net, tt.ThinConfig(rank=900), method="svd_lora", calibration=[inputs(6, 9)])
    assert {n: type(m) for n, m in net.named_modules()} == before


def test_an_adapted_structure_is_rebuilt_from_its_description(make, inputs):
    x, net, empty = inputs(6, 9), make(), make()
    tt.convert_(net, tt.ThinConfig(rank=4), method="svd_lora", calibration=[x])
    for name, module in list(net.named_modules()):
        if type(module) is ThinLinear:
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, AdaptedLinear(module, 2, 3.0))
    described = describe(net)
    assert {spec["kind"] for spec in described.values()} == {"AdaptedLinear"}
    rebuild_(empty, json.loads(json.dumps(described)))
    empty.load_state_dict(net.state_dict(), assign=True)
    assert describe(empty) == described
    with torch.no_grad():
        assert torch.equal(net.eval()(x), empty.eval()(x))
