from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import weakref
from collections import OrderedDict
from types import MappingProxyType

import pytest
import torch
from torch import nn

import thintune as tt
from thintune.convert.calibration import Moments, blocks, groups, moments
from thintune.convert.ranks import break_even_rank
from thintune.convert.structure import describe, rebuild_
from thintune.errors import ConfigError, ConversionError
from thintune.linalg import truncated_svd
from thintune.nn import CompressedLinear, FactorLinear, SubspaceLinear, ThinLinear

METHODS = ["thin", "wsi", "wasi", "asi", "amc"]
KINDS = {
    "thin": SubspaceLinear,
    "wsi": FactorLinear,
    "wasi": FactorLinear,
    "asi": CompressedLinear,
    "amc": CompressedLinear,
}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


# What may be asked for.


def test_every_layer_with_too_high_a_rank_is_named_and_the_model_is_untouched(net, inputs):
    before = state(net)
    with pytest.raises(ConversionError) as error:
        tt.convert_(net, tt.ThinConfig(rank=20, include_modules=["blocks.0", "head"]), calibration=[inputs(9)])
    assert str(error.value).count("exceeds") == 1  # 20 fits 24 x 40, not 5 x 24
    assert "head: rank 20 exceeds min(in_features=24, out_features=5); use rank <= 5" in str(error.value)
    with pytest.raises(ConversionError) as error:
        tt.convert_(net, tt.ThinConfig(rank=25), method="wsi")
    assert str(error.value).count("exceeds") == 5
    assert_untouched(net, before)


@pytest.mark.parametrize("method", ["thin", "wasi", "asi"])
@pytest.mark.parametrize("calibration", [None, [], iter(())])
def test_calibration_is_asked_for_before_anything_changes(net, method, calibration):
    before = state(net)
    with pytest.raises(ConversionError, match="expected at least one batch"):
        tt.convert_(net, method=method, calibration=calibration)
    assert_untouched(net, before)


def test_a_tensor_is_no_list_of_batches(net, inputs):
    with pytest.raises(ConversionError, match=r"pass calibration=\[images\]"):
        tt.convert_(net, calibration=inputs(9))


def test_unknown_methods_are_refused_with_the_nearest_name(net):
    with pytest.raises(ConfigError, match="Did you mean 'wasi'"):
        tt.convert_(net, method="wassi")
    with pytest.raises(ConfigError, match="expected one of thin, wasi, wsi, asi"):
        tt.convert_(net, method="dense")


def test_a_share_below_rank_one_is_refused(net, inputs):
    before = state(net)
    with pytest.raises(ConversionError, match=r"kept=0.001: rank 1 everywhere"):
        tt.convert_(net, tt.ThinConfig(kept=0.001), calibration=[inputs(30)])
    assert_untouched(net, before)


def test_an_error_inside_the_model_leaves_no_hook_and_restores_the_modes(net):
    net.train()
    before = state(net)
    with pytest.raises(RuntimeError):
        tt.convert_(net, calibration=[torch.zeros(2, 7, dtype=torch.float64)])
    assert_untouched(net, before)
    assert all(m.training for m in net.modules())


# How much is kept.


@pytest.mark.parametrize("method", ["thin", "wsi"])
def test_the_kept_share_is_reached_from_below_and_grows(make, inputs, method):
    dense, batch = make(), inputs(200)
    reached, ranks = [], []
    for kept in (0.2, 0.35, 0.5, 0.65, 0.8):
        report = tt.convert_(copy.deepcopy(dense), tt.ThinConfig(kept=kept), method=method, calibration=[batch])
        assert kept - 0.02 <= report.kept_weight_fraction <= kept
        reached.append(report.kept_weight_fraction)
        ranks.append([layer.rank for layer in report.converted])
    assert reached == sorted(set(reached))
    assert all(a <= b for less, more in itertools.pairwise(ranks) for a, b in zip(less, more, strict=True))


@pytest.mark.parametrize("share", [{"kept": 1.0}, {"explained_variance": 1.0}])
def test_thin_weights_never_grow_beyond_the_dense_ones(net, inputs, share):
    limits = {n: break_even_rank(m) for n, m in net.named_modules() if isinstance(m, nn.Linear)}
    report = tt.convert_(net, tt.ThinConfig(**share), calibration=[inputs(200)])
    assert {layer.name: layer.rank for layer in report.converted} == limits
    assert all(layer.bytes_after <= layer.bytes_before for layer in report.converted)


def test_full_explained_variance_of_the_weights_is_the_dense_model(net, inputs):
    x = inputs(7)
    expected = net.eval()(x)
    report = tt.convert_(net, tt.ThinConfig(explained_variance=1.0), method="wsi")
    assert [layer.rank for layer in report.converted] == [24, 24, 24, 24, 5]
    assert (net(x) - expected).abs().max() < 1e-12


def test_a_missing_rank_has_a_default_per_method(make, inputs):
    thin = tt.convert_(make(), calibration=[inputs(200)])
    assert 0.58 <= thin.kept_weight_fraction <= 0.6
    dense = make()
    ranks = [
        [layer.rank for layer in tt.convert_(copy.deepcopy(dense), config, method="wsi").converted]
        for config in (None, tt.ThinConfig(), tt.ThinConfig(explained_variance=0.9))
    ]
    assert ranks[0] == ranks[1] == ranks[2]


# What the factors are.


def test_data_aware_factors_lose_less_of_the_output_than_the_svd_of_the_weight(make, inputs):
    dense, batch = make().eval(), inputs(300)
    layers = {n: m for n, m in dense.named_modules() if isinstance(m, nn.Linear)}
    seen: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].detach()))
    dense(batch)
    for rank in (1, 3, 4):
        for name, layer in layers.items():
            single = nn.Sequential(copy.deepcopy(layer))
            single[0]._forward_pre_hooks.clear()
            with torch.no_grad():
                expected = single(seen[name])
                tt.convert_(single, tt.ThinConfig(rank=rank), calibration=[seen[name]])
                left, right = truncated_svd(layer.weight, rank=rank)
                plain = seen[name] @ right.T @ left.T + layer.bias
                aware, svd = ((y - expected).norm() for y in (single(seen[name]), plain))
            least = torch.linalg.svdvals(expected - expected.mean(0))[rank:].norm()
            assert float(aware) == pytest.approx(float(least), rel=1e-4), (name, rank)
            assert aware < 0.95 * svd, (name, rank)


def test_the_bias_takes_up_the_lost_mean(inputs):
    model, batch = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 3)).double(), inputs(100)
    config = tt.ThinConfig(rank=2, include_modules=["0"])
    with torch.no_grad():
        mean, old_bias = model[0](batch).mean(0), model[0].bias.clone()
        tt.convert_(model, config, calibration=[batch[:30], batch[30:]])
        assert (model[0](batch).mean(0) - mean).abs().max() < 1e-12
        assert (model[0](batch) - old_bias + model[0].bias - mean).abs().max() > 0.1
    assert (model[0].bias - old_bias).abs().max() > 1e-3


def test_layers_without_bias_get_none_and_explain_the_second_moment(inputs):
    model, batch = nn.Sequential(nn.Linear(24, 16, bias=False), nn.Linear(16, 3, bias=False)).double(), inputs(100)
    second = batch.T @ batch
    weight = model[0].weight.detach().clone()
    tt.convert_(model, tt.ThinConfig(rank=2), calibration=[batch])
    assert model[0].bias is None and model[1].bias is None
    values = torch.linalg.eigvalsh(weight @ second @ weight.T).flip(0)
    with torch.no_grad():
        lost = (batch @ weight.T - model[0](batch)).square().sum()
    assert lost / values[2:].sum() == pytest.approx(1, abs=1e-4)


def test_a_full_rank_layer_is_its_dense_one_where_the_inputs_never_went(inputs):
    dense = nn.Linear(24, 40).double()
    model = nn.Sequential(copy.deepcopy(dense))
    few = inputs(6)  # a covariance of rank 5
    tt.convert_(model, tt.ThinConfig(rank=24), calibration=[few])
    assert (model[0].left @ model[0].right - dense.weight).abs().max() < 1e-9


def test_left_is_orthonormal_and_the_basis_holds_the_inputs_leading_directions(net, inputs):
    batch = inputs(100)
    seen: list[torch.Tensor] = []
    net.blocks[0].norm.register_forward_hook(lambda *args: seen.append(args[2].detach()))
    tt.convert_(net, tt.ThinConfig(rank=5, activation_rank=4), calibration=[batch])
    for layer in (m for m in net.modules() if isinstance(m, SubspaceLinear)):
        assert (layer.left.T @ layer.left - torch.eye(5)).abs().max() < 1e-12
        assert layer.basis.shape == (layer.in_features, 4)
        assert not layer.update.any()
    x, basis = seen[0], net.blocks[0].fc1.basis
    lost = (x - x @ basis @ basis.T).square().sum()
    assert lost == pytest.approx(float(torch.linalg.svdvals(x)[4:].square().sum()))


def test_later_blocks_are_fitted_on_the_converted_path(make, inputs):
    dense, batch = make().eval(), inputs(150)
    thin = copy.deepcopy(dense)
    tt.convert_(thin, tt.ThinConfig(rank=2), calibration=[batch])
    x = thin.blocks[0](batch)
    normed = dense.blocks[1].norm(x)
    expected, found = dense.blocks[1].fc1(normed).mean(0), thin.blocks[1].fc1(normed).mean(0)
    assert (expected - found).abs().max() < 1e-12  # the mean on the dense path is another one
    assert (dense.blocks[1].fc1(dense.blocks[1].norm(dense.blocks[0](batch))).mean(0) - expected).abs().max() > 1e-3


# Which models.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("leading", [(12,), (4, 5), (3, 2, 5)])
def test_inputs_of_two_three_and_four_axes(make, inputs, method, leading):
    net, x = make(), inputs(*leading)
    config = tt.ThinConfig(rank=5, activation_rank=6)
    report = tt.convert_(net, config, method=method, calibration=[x])
    assert all(isinstance(net.get_submodule(layer.name), KINDS[method]) for layer in report.converted)
    if method in ("wasi", "asi"):
        assert all(len(layer.activation_ranks) == len(leading) + 1 for layer in report.converted)
    output = net(x)
    assert output.shape == (*leading, 5)
    output.sum().backward()
    trained = [p for p in net.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.dtype == torch.float64 for p in trained)


class Branches(nn.Module):
    """Two layers in use, one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused, self.last = nn.Linear(24, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.double()

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return self.last(torch.tanh(scale * self.first(x)))


@pytest.mark.parametrize("method", ["thin", "wasi", "asi"])
@pytest.mark.parametrize("share", [{"rank": 2}, {"kept": 0.5}, {"explained_variance": 0.9}])
def test_layers_that_are_never_called_are_skipped_as_they_are(inputs, method, share):
    model = Branches()
    unused, before = model.unused, state(model.unused)
    report = tt.convert_(model, tt.ThinConfig(**share), method=method, calibration=[inputs(6, 9)])
    assert [layer.name for layer in report.converted] == ["first", "last"]
    skipped = report.layers[1]
    assert (skipped.name, skipped.skipped) == ("unused", "never called on the calibration inputs")
    assert skipped.bytes_after == skipped.bytes_before == 16 * 16 * 8
    assert model.unused is unused
    assert_untouched(unused, before)


@pytest.mark.parametrize("method", ["thin", "wasi", "asi"])
@pytest.mark.parametrize("share", [{"rank": 2}, {"kept": 0.5}])
def test_a_model_none_of_whose_layers_is_called_is_an_error(inputs, method, share):
    model = Branches()
    before = state(model)
    config = tt.ThinConfig(**share, include_modules=["unused"])
    with pytest.raises(ConversionError, match="none of unused is called"):
        tt.convert_(model, config, method=method, calibration=[inputs(6, 9)])
    assert_untouched(model, before)


def test_a_layer_called_by_keyword_is_refused(inputs):
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(24, 3).double()

        def forward(self, x):
            return self.fc(input=x)

    with pytest.raises(ConversionError, match="fc: expected a call as layer"):
        tt.convert_(Keyword(), tt.ThinConfig(rank=2), calibration=[inputs(5)])


@pytest.mark.parametrize(
    "pack",
    [
        lambda x: x,
        lambda x: (x,),
        lambda x: [x],
        lambda x: {"x": x, "scale": 1.0},
        lambda x: MappingProxyType({"x": x}),
        lambda x: OrderedDict(x=x),
    ],
    ids=["tensor", "tuple", "list", "dict", "mapping", "ordered"],
)
@pytest.mark.parametrize("method", ["thin", "asi"])
def test_batches_may_be_tensors_tuples_and_mappings(inputs, pack, method):
    model, x = Branches(), inputs(6, 9)
    plain = copy.deepcopy(model)
    tt.convert_(plain, tt.ThinConfig(rank=2), method=method, calibration=[x])
    tt.convert_(model, tt.ThinConfig(rank=2), method=method, calibration=iter([pack(x)]))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


def test_moments_do_not_depend_on_how_the_inputs_are_cut(net, inputs):
    batch = inputs(60)
    layers = {"blocks.1.fc1": net.blocks[1].fc1}
    whole = moments(net, layers, [batch])["blocks.1.fc1"]
    cut = moments(net, layers, [batch[:7], batch[7:40].reshape(3, 11, 24), batch[40:]])["blocks.1.fc1"]
    assert whole.count == cut.count == 60
    assert (whole.covariance - cut.covariance).abs().max() < 1e-12
    assert (whole.mean - cut.mean).abs().max() < 1e-12


# What is left as it was.


@pytest.mark.parametrize("method", METHODS)
def test_modes_are_restored_module_by_module(net, inputs, method):
    net.train()
    net.blocks[1].eval()
    expected = {name: module.training for name, module in net.named_modules()}
    tt.convert_(net, tt.ThinConfig(rank=3), method=method, calibration=[inputs(6, 9)])
    found = {name: module.training for name, module in net.named_modules()}
    assert {name: found[name] for name in expected} == expected


def test_calibration_runs_without_dropout(make, inputs):
    first, batch = make(), inputs(50)
    second = copy.deepcopy(first).eval()
    for model in (first.train(), second):
        tt.convert_(model, tt.ThinConfig(rank=3), calibration=[batch])
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_frozen_weights_and_biases_stay_frozen(net, inputs, method):
    net.blocks[0].requires_grad_(False)
    net.blocks[1].fc1.weight.requires_grad_(False)
    net.blocks[1].fc2.bias.requires_grad_(False)
    tt.convert_(net, tt.ThinConfig(rank=3), method=method, calibration=[inputs(6, 9)])
    assert not any(p.requires_grad for p in net.blocks[0].parameters())
    trained = {n for n, p in net.blocks[1].named_parameters() if p.requires_grad}
    factors, weight = {"fc2.left", "fc2.right"}, {"fc2.weight"}
    weights = {"thin": {"fc2.update"}, "asi": weight, "amc": weight}.get(method, factors)
    assert trained == {"norm.weight", "norm.bias", "fc1.bias", *weights}
    net(inputs(6, 9)).sum().backward()
    assert net.blocks[1].fc1.bias.grad is not None
    assert net.blocks[0].fc1.bias.grad is None
    tt.merge_(net)
    assert not any(p.requires_grad for p in net.blocks[0].parameters())
    trained = {n for n, p in net.blocks[1].named_parameters() if p.requires_grad}
    assert trained == {"norm.weight", "norm.bias", "fc1.bias", "fc2.weight"}


def test_the_model_stays_itself(net, inputs):
    kind, blocks_, first = type(net), net.blocks, net.blocks[0]
    tt.convert_(net, tt.ThinConfig(rank=3), calibration=[inputs(9)])
    assert type(net) is kind and net.blocks is blocks_ and net.blocks[0] is first


@pytest.mark.parametrize("method", METHODS)
def test_no_random_number_is_drawn(net, inputs, method):
    batch = inputs(6, 9)
    before = torch.get_rng_state()
    tt.convert_(net, tt.ThinConfig(rank=3), method=method, calibration=[batch])
    assert torch.equal(torch.get_rng_state(), before)


# Memory.


@pytest.mark.parametrize("method", ["thin", "wsi", "wasi"])
def test_dense_weights_are_released(net, inputs, method):
    layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.Linear)}
    kept = layers.pop("blocks.1.fc2")
    weights = {name: weakref.ref(layer.weight) for name, layer in layers.items()}
    modules = {name: weakref.ref(layer) for name, layer in layers.items()}
    del layers
    report = tt.convert_(net, tt.ThinConfig(rank=3), method=method, calibration=[inputs(6, 9)])
    assert len(report.converted) == 5
    assert [name for name, weight in weights.items() if weight() is not None] == []
    assert [name for name, module in modules.items() if module() is not None] == []
    assert kept.weight.shape == (24, 40)  # the caller's own reference is the only one that counts


def test_dense_weights_are_released_block_by_block(make, inputs):
    net = make(depth=4)
    weights = [weakref.ref(m.weight) for n, m in net.named_modules() if isinstance(m, nn.Linear) and n != "head"]
    alive: list[int] = []
    for block in net.blocks:
        block.register_forward_pre_hook(lambda *_: alive.append(sum(w() is not None for w in weights)))
    tt.convert_(net, tt.ThinConfig(rank=3, exclude_modules=["head"]), calibration=[inputs(9)])
    assert alive[0] == 8
    assert alive[-1] == 2  # the block at hand


@pytest.mark.parametrize(
    ("limit", "most"), [(1, 40 * 40 * 8), (17_408, (24 * 24 + 40 * 40) * 8), (22_100, (24 * 24 + 40 * 40) * 8)]
)
def test_no_more_than_one_group_of_second_moments_is_held(make, inputs, monkeypatch, limit, most):
    net = make(depth=3)
    held: list[weakref.ref] = []
    peak = [0]
    empty = Moments.empty.__func__

    def watched(cls, features, like):
        found = empty(cls, features, like)
        held.append(weakref.ref(found))
        peak[0] = max(peak[0], sum(m().outer.nbytes for m in held if m() is not None))
        return found

    monkeypatch.setattr(Moments, "empty", classmethod(watched))
    monkeypatch.setattr(groups, "__defaults__", (limit,))
    tt.convert_(net, tt.ThinConfig(kept=0.5), calibration=[inputs(40)])
    assert len(held) == 2 * 7  # both passes, every layer
    assert peak[0] == most


def test_groups_respect_the_limit_and_keep_the_order(make):
    layers = {n: m for n, m in make(depth=3).named_modules() if isinstance(m, nn.Linear)}
    need = {n: m.in_features**2 * 8 for n, m in layers.items()}
    for limit in (1, 24 * 24 * 8, 20_000, 40_000, 10**9):
        cut = list(groups(layers, limit))
        assert [n for group in cut for n in group] == list(layers)
        assert all(len(group) == 1 or sum(need[n] for n in group) <= limit for group in cut)
        following = itertools.pairwise(cut)
        assert all(sum(need[n] for n in a) + need[next(iter(b))] > limit for a, b in following)  # none cut too early


def test_blocks_are_cut_at_the_first_number():
    names = ["stem", "blocks.0.fc1", "blocks.0.fc2", "blocks.1.mlp.0", "blocks.1.mlp.2", "head"]
    cut = blocks({name: nn.Linear(2, 2) for name in names})
    assert [list(block) for block in cut] == [["stem"], names[1:3], names[3:5], ["head"]]


# The report.


def test_the_report_counts_bytes_and_names_reasons(net, inputs):
    config = tt.ThinConfig(rank=5, activation_rank=6, exclude_modules=["head"])
    report = tt.convert_(net, config, calibration=[inputs(30)])
    dense, thin = 24 * 40 * 8, 5 * (24 + 40) * 8
    assert report.method == "thin"
    assert [layer.name for layer in report.layers] == [f"blocks.{i}.fc{k}" for i in (0, 1) for k in (1, 2)] + ["head"]
    first, head = report.layers[0], report.layers[-1]
    assert dataclasses.astuple(first) == ("blocks.0.fc1", 40, 24, 5, (6,), dense, thin, None)
    assert dataclasses.astuple(head) == ("head", 5, 24, None, None, 960, 960, "excluded by 'head'")
    assert (report.bytes_before, report.bytes_after) == (4 * dense, 4 * thin)
    assert report.kept_weight_fraction == thin / dense
    lines = str(report).splitlines()
    assert lines[1].split() == ["blocks.0.fc1", "40", "x", "24", "5", "6", "7.7", "2.6"]
    assert lines[5].split(maxsplit=4)[-1] == "skipped: excluded by 'head'"
    assert lines[6] == "4 of 5 linear layers converted (thin); weights 0.03 MB -> 0.01 MB, 0.333 kept"
    held = sum(p.nbytes for m in net.modules() if isinstance(m, ThinLinear) for p in (m.left, m.right))
    assert held == report.bytes_after


def test_the_report_of_the_other_methods(make, inputs):
    x = inputs(6, 9)
    whole = tt.convert_(make(), tt.ThinConfig(rank=5), method="wsi")
    assert {layer.activation_ranks for layer in whole.converted} == {None}
    assert " whole " in str(whole)
    dense = tt.convert_(make(), method="asi", calibration=[x])
    assert dense.bytes_after == dense.bytes_before and dense.kept_weight_fraction == 1.0
    assert {layer.rank for layer in dense.converted} == {None}
    assert " dense " in str(dense)
    ranks = dense.converted[0].activation_ranks
    assert "x".join(map(str, ranks)) in str(dense)


# Ranks of a plan.


def test_planned_ranks_are_taken(net, inputs):
    config, x = tt.ThinConfig(include_modules=["blocks.0"]), inputs(6, 9)
    plan = {"blocks.0.fc1": (2, 3, 4), "blocks.0.fc2": (3, 2, 5)}
    report = tt.convert_(net, config, method="asi", calibration=[x], activation_ranks=plan)
    assert {layer.name: layer.activation_ranks for layer in report.converted} == plan
    assert net.blocks[0].fc1.compressor.ranks == (2, 3, 4)


def test_all_faults_of_a_plan_are_named_and_the_model_is_untouched(net, inputs):
    before = state(net)
    plan = {"blocks.0.fc1": (2, 3), "blocks.0.fc3": (2, 3, 4), "blocks.1.fc1": (2, 3, 4), "head": (1, 1, 1)}
    config = tt.ThinConfig(exclude_modules=["blocks.1.fc2"])
    with pytest.raises(ConversionError) as error:
        tt.convert_(net, config, method="wasi", calibration=[inputs(6, 9)], activation_ranks=plan)
    text = str(error.value)
    assert "'blocks.0.fc3' is no converted layer. Did you mean 'blocks.0.fc" in text
    assert "blocks.0.fc1: expected 3 ranks for an input of shape (6, 9, 24), got (2, 3)." in text
    assert "blocks.0.fc2: expected 3 ranks for an input of shape (6, 9, 40), got none." in text
    assert "head" not in text
    assert_untouched(net, before)


def test_compressors_have_the_type_of_the_input(inputs):
    model = nn.Sequential(nn.Linear(24, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    assert torch.get_default_dtype() == torch.float32
    tt.convert_(model, method="asi", calibration=[inputs(6, 9)])
    assert {b.dtype for b in model.buffers()} == {torch.float64}
    model(inputs(6, 9)).sum().backward()


# There and back.


@pytest.mark.parametrize("method", METHODS)
def test_merging_gives_a_dense_model_with_the_same_outputs(net, inputs, method):
    x = inputs(6, 9)
    names = list(net.state_dict())
    tt.convert_(net, tt.ThinConfig(rank=4), method=method, calibration=[x])
    net.eval()
    with torch.no_grad():
        expected = net(x)
        assert tt.merge_(net) is net
        assert (net(x) - expected).abs().max() < 1e-12
    assert list(net.state_dict()) == names
    assert all(type(net.get_submodule(n)) is nn.Linear for n in ("blocks.0.fc1", "head"))
    assert not any(m.training for m in net.modules())


@pytest.mark.parametrize("method", METHODS)
def test_a_full_rank_round_trip_is_the_dense_model(make, inputs, method):
    net, x = make(), inputs(6, 9)
    before = state(net)
    tt.convert_(net, tt.ThinConfig(rank=24, exclude_modules=["head"]), method=method, calibration=[x])
    tt.merge_(net)
    assert all((net.state_dict()[name] - tensor).abs().max() < 1e-9 for name, tensor in before.items())


@pytest.mark.parametrize("method", METHODS)
def test_a_structure_is_rebuilt_from_its_description(make, inputs, method):
    x, net = inputs(6, 9), make()
    empty = copy.deepcopy(net)
    for model in (net, empty):
        model.blocks[0].fc1.weight.requires_grad_(False)
        model.blocks[1].eval()
    tt.convert_(net, tt.ThinConfig(rank=4, activation_rank=6), method=method, calibration=[x])
    described = describe(net)
    assert {spec["kind"] for spec in described.values()} == {KINDS[method].__name__}
    rebuild_(empty, json.loads(json.dumps(described)))
    assert all(p.is_meta for p in empty.blocks[0].fc1.parameters())
    empty.load_state_dict(state(net), assign=True)
    assert describe(empty) == described
    for (name, ours), (_, theirs) in zip(net.named_parameters(), empty.named_parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype, name
        assert ours.requires_grad == theirs.requires_grad, name
    for model in (net, empty):
        model.drop.p = 0.0
        model(x).square().sum().backward()
    for (name, ours), (_, theirs) in zip(net.named_parameters(), empty.named_parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name
    assert [m.training for m in net.modules()] == [m.training for m in empty.modules()]
