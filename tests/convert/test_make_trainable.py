"""Thin layers made ready to train on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import thintune as tt
from thintune.errors import ConversionError
from thintune.nn import SubspaceLinear, ThinLinear


@pytest.fixture
def shipped(make, inputs, tmp_path):
    """A network as a checkpoint gives it back, and inputs it was fitted to."""
    net, batch = make(depth=3), inputs(200)
    tt.convert_(net, tt.ThinConfig(rank=6, exclude_modules=["head"]), calibration=[batch])
    tt.save_checkpoint(net, tmp_path)
    return tt.load_checkpoint_(make(depth=3), tmp_path), batch


def thin_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, ThinLinear)}


def test_factors_and_biases_share_the_memory_of_the_loaded_ones(shipped):
    model, batch = shipped
    before = {n: (m.left.data_ptr(), m.right.data_ptr(), m.bias.data_ptr()) for n, m in thin_layers(model).items()}
    with torch.no_grad():
        expected = model.eval()(batch)
    report = tt.make_trainable_(model, tt.ThinConfig(activation_rank=5), calibration=[batch])
    for name, layer in thin_layers(model).items():
        assert type(layer) is SubspaceLinear
        assert (layer.left.data_ptr(), layer.right.data_ptr(), layer.bias.data_ptr()) == before[name]
        assert layer.basis.shape == (layer.in_features, 5) and not layer.update.any()
        assert layer.basis.dtype == layer.update.dtype == torch.float64
        assert not layer.left.requires_grad and layer.update.requires_grad and layer.bias.requires_grad
    with torch.no_grad():
        assert torch.equal(model(batch), expected)
    assert [layer.name for layer in report.converted] == list(before) and report.layers[-1].name == "head"
    assert report.kept_weight_fraction == 6 * (24 + 40) / (24 * 40)


def test_bases_hold_nearly_as_much_of_the_inputs_as_the_best_of_their_size(shipped):
    model, batch = shipped
    seen: dict[str, torch.Tensor] = {}
    for name, layer in thin_layers(model).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].detach()))
    with torch.no_grad():
        model.eval()(batch)
    tt.make_trainable_(model, tt.ThinConfig(activation_rank=5), calibration=list(batch.split(37)))
    for name, layer in thin_layers(model).items():
        assert (layer.basis.T @ layer.basis - torch.eye(5)).abs().max() < 1e-12
        held = (seen[name] @ layer.basis).square().sum()
        best = torch.linalg.svdvals(seen[name])[:5].square().sum()
        assert 0.99 * best < held <= best * (1 + 1e-12), name


def test_the_seed_decides_the_start_and_nothing_else_is_drawn(shipped):
    model, batch = shipped
    found, before = [], torch.get_rng_state()
    for seed in (0, 0, 1):
        other = copy.deepcopy(model)
        tt.make_trainable_(other, tt.ThinConfig(activation_rank=3), calibration=iter([batch]), seed=seed)
        found.append(other.blocks[1].fc2.basis)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_what_was_frozen_stays_frozen_and_modes_are_kept(shipped):
    model, batch = shipped
    model.train()
    model.blocks[0].eval()
    model.blocks[1].fc1.requires_grad_(False)
    tt.make_trainable_(model, calibration=[batch])
    assert not any(p.requires_grad for p in model.blocks[1].fc1.parameters())
    assert not model.blocks[0].fc1.training and model.blocks[2].fc1.training


def test_training_lowers_the_loss(shipped):
    model, batch = shipped
    tt.make_trainable_(model, tt.ThinConfig(activation_rank=8), calibration=[batch])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tt.ThinStep(model, optimizer, refresh_every=3)
    target, losses = batch[:, :5].sin(), []
    for _ in range(12):
        loss = (model.eval()(batch) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_what_cannot_be_done_is_said_before_anything_changes(make, inputs, shipped):
    with pytest.raises(ConversionError, match="no thin layer"):
        tt.make_trainable_(make(), calibration=[inputs(5)])
    model, _ = shipped
    with pytest.raises(ConversionError, match="expected at least one batch"):
        tt.make_trainable_(model, calibration=[])
    assert all(type(m) is ThinLinear for m in thin_layers(model).values())
    assert isinstance(model.head, nn.Linear)


@pytest.mark.parametrize("where", ["file", "config"])
def test_factors_may_be_stored_in_bfloat16(make, inputs, where, tmp_path):
    net, batch = make().float(), inputs(100).float()
    dtypes = {"file": ("bfloat16", "float32"), "config": ("float32", "bfloat16")}[where]
    config = tt.ThinConfig(rank=6, exclude_modules=["head"], factor_dtype=dtypes[0])
    tt.convert_(net, config, calibration=[batch])
    tt.save_checkpoint(net, tmp_path)
    model = tt.load_checkpoint_(make().float(), tmp_path)
    tt.make_trainable_(model, tt.ThinConfig(factor_dtype=dtypes[1]), calibration=[batch])
    layer = model.blocks[1].fc1
    assert layer.left.dtype == layer.right.dtype == torch.bfloat16
    assert layer.basis.dtype == layer.update.dtype == layer.bias.dtype == torch.float32
    model(batch).square().sum().backward()
    assert layer.update.grad is not None
