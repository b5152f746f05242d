"""Reconstruction of converted blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import thintune as tt
from thintune.convert.calibration import Call
from thintune.convert.reconstruction import reconstruct_
from thintune.errors import ConfigError, ConversionError
from thintune.nn import SubspaceLinear


def features(model, x):
    model.eval()
    with torch.no_grad():
        for block in model.blocks:
            x = block(x)
    return x


def config(**further):
    return tt.ThinConfig(kept=0.3, activation_rank=6, exclude_modules=["head"], **further)


def test_a_block_comes_nearer_to_its_targets_and_stays_what_it_is(make, inputs):
    net, x = make(depth=1), [inputs(20, 5), inputs(15, 5), inputs(7, 5)]
    targets = [features(net, each).clone() for each in x]
    tt.convert_(net, config(), calibration=x)
    net.train()
    block, before = net.blocks[0], copy.deepcopy(net.state_dict())
    calls = [Call((each,), {}) for each in x]
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    kept = [each.clone() for each in x]
    errors = reconstruct_(block, calls, targets, 100)
    mean = torch.cat(targets).mean((0, 1))
    spread = (torch.cat(targets) - mean).square().sum(-1).mean()
    net.train()
    with torch.no_grad():
        lost = sum((block(each) - t).square().sum() for each, t in zip(x, targets, strict=True)) / (42 * 5)
    assert errors.after == pytest.approx(float(lost / spread))
    assert errors.after < 0.9 * errors.before
    for layer in (block.fc1, block.fc2):
        assert (layer.left.T @ layer.left - torch.eye(layer.rank)).abs().max() < 1e-12
        assert layer.right.is_contiguous() and layer.left.is_contiguous() and not layer.update.any()
    assert {name: p.requires_grad for name, p in net.named_parameters()} == flags
    assert all(p.grad is None for p in net.parameters()) and net.training
    assert all(torch.equal(one, two) for one, two in zip(x, kept, strict=True))
    changed = {n for n, tensor in net.state_dict().items() if not torch.equal(tensor, before[n])}
    names = {f"blocks.0.{fc}.{part}" for fc in ("fc1", "fc2") for part in ("left", "right", "bias")}
    assert changed == names | {"blocks.0.norm.weight", "blocks.0.norm.bias"}


def test_later_blocks_are_brought_back_to_the_dense_path(make, inputs):
    net = make(depth=4)
    batch = inputs(60)
    expected = features(net, batch)
    plain, mended = copy.deepcopy(net), copy.deepcopy(net)
    tt.convert_(plain, config(), calibration=[batch])
    report = tt.convert_(mended, config(reconstruction_steps=100), calibration=[batch])
    assert report.kept_weight_fraction <= 0.3
    lost = [(features(model, batch) - expected).square().sum() for model in (plain, mended)]
    assert lost[1] < 0.9 * lost[0]


def test_what_is_frozen_stays_as_it_is_but_for_the_factors(make, inputs):
    net, x = make(depth=2).requires_grad_(False), [inputs(60)]
    norms = [block.norm.weight.clone() for block in net.blocks]
    plain = copy.deepcopy(net)
    tt.convert_(plain, config(), calibration=x)
    tt.convert_(net, config(reconstruction_steps=5), calibration=x)
    assert not any(p.requires_grad for p in net.parameters())
    assert all(torch.equal(block.norm.weight, old) for block, old in zip(net.blocks, norms, strict=True))
    assert not torch.equal(net.blocks[0].fc1.left, plain.blocks[0].fc1.left)
    assert torch.equal(net.blocks[0].fc1.bias, plain.blocks[0].fc1.bias)


def test_narrow_factors_are_trained_wide(make, inputs):
    net = make(depth=2).float()
    tt.convert_(net, config(reconstruction_steps=3, factor_dtype="bfloat16"), calibration=[inputs(60).float()])
    layer = net.blocks[1].fc2
    assert isinstance(layer, SubspaceLinear)
    assert layer.left.dtype == layer.right.dtype == torch.bfloat16 and layer.bias.dtype == torch.float32
    assert not layer.left.requires_grad and layer.update.requires_grad


def test_no_random_number_is_drawn_and_the_result_is_always_the_same(make, inputs):
    net, batches = make(depth=2), [inputs(30), inputs(30)]
    other = copy.deepcopy(net)
    start = torch.get_rng_state()
    for model in (net, other):
        tt.convert_(model, config(reconstruction_steps=4, output_weighting="gradient"), calibration=batches)
    assert torch.equal(torch.get_rng_state(), start)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_model_without_a_chain_of_blocks_is_refused_untouched(inputs):
    model = nn.Sequential(nn.Linear(24, 16)).double()
    weight = model[0].weight.clone()
    with pytest.raises(ConversionError, match=r"reconstruction_steps: .*found none; got 5"):
        tt.convert_(model, tt.ThinConfig(kept=0.5, reconstruction_steps=5), calibration=[inputs(30)])
    assert torch.equal(model[0].weight, weight)


def test_a_negative_number_of_steps_is_refused():
    with pytest.raises(ConfigError, match=r"thin\.reconstruction_steps: expected at least 0, got -1"):
        tt.ThinConfig(reconstruction_steps=-1)
