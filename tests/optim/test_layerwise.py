"""Stepping layer by layer during the backward pass equals stepping after it."""

import copy
import gc

import pytest
import timm
import torch

import thintune as tt
from thintune.config import TrainConfig
from thintune.errors import ConfigError
from thintune.nn import SubspaceLinear
from thintune.optim import LayerwiseStep, ThinStep, build_optimizer


def model_of(method):
    torch.manual_seed(0)
    options = {"depth": 2, "embed_dim": 24, "num_heads": 3, "patch_size": 7, "img_size": 28}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **options)
    if method != "dense":
        config = tt.ThinConfig(kept=0.5, exclude_modules=("head",), activation_rank=5)
        tt.convert_(model, config, method=method, calibration=[images(4)])
    return model


def images(count, seed=1):
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


def train(model, optimizer, layerwise, steps=5):
    for step in range(steps):
        parts = images(6, seed=step).to(next(model.parameters()).dtype).split(2)
        if layerwise is not None:
            layerwise.begin()
        for number, part in enumerate(parts):
            loss = model(part).square().sum()
            if layerwise is not None and number == len(parts) - 1:
                with layerwise.last():
                    loss.backward()
            else:
                loss.backward()
        if layerwise is None:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("method", ["thin", "wasi", "wsi", "dense"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_steps_equal_the_plain_ones_with_sgd_but_for_the_order_of_a_sum(method, kind):
    config = TrainConfig(optimizer=kind, learning_rate=1e-3, clip_norm=None)
    plain = model_of(method).double()
    other = copy.deepcopy(plain)
    results = []
    for model, fused in ((plain, False), (other, True)):
        optimizer = build_optimizer(model, config)
        thin_step = ThinStep(model, optimizer, refresh_every=2)
        train(model, optimizer, LayerwiseStep(model, optimizer, thin_step) if fused else None)
        assert thin_step.steps == 5
        results.append((model.state_dict(), optimizer.state_dict()["state"]))
    (weights, moments), (fused_weights, fused_moments) = results
    tolerance = {"rtol": 0, "atol": 0} if kind == "adamw" else {"rtol": 1e-9, "atol": 1e-9}
    for name, tensor in weights.items():
        torch.testing.assert_close(fused_weights[name], tensor, **tolerance, msg=name)
    assert moments.keys() == fused_moments.keys()
    for key, state in moments.items():
        for name, value in state.items():
            torch.testing.assert_close(fused_moments[key][name], value, **tolerance)


def test_no_gradient_outlives_the_backward_pass_and_updates_share_their_memory():
    model = model_of("thin")
    optimizer = build_optimizer(model, TrainConfig(clip_norm=None))
    layerwise = LayerwiseStep(model, optimizer, ThinStep(model, optimizer))
    train(model, optimizer, layerwise, steps=1)
    gc.collect()
    assert all(p.grad is None for p in model.parameters())
    updates = [m.update for m in model.modules() if isinstance(m, SubspaceLinear)]
    shapes = {tuple(u.shape) for u in updates}
    assert len(updates) == 8
    assert len({u.data_ptr() for u in updates}) == len(shapes) == 3
    assert not any(bool(u.any()) for u in updates)


def test_sgd_needs_one_buffer_a_parameter():
    model = model_of("thin")
    optimizer = build_optimizer(model, TrainConfig(optimizer="sgd", clip_norm=None))
    layerwise = LayerwiseStep(model, optimizer, ThinStep(model, optimizer))
    train(model, optimizer, layerwise, steps=1)
    moments = {p: state["momentum_buffer"].data_ptr() for p, state in optimizer.state.items()}
    layerwise.begin()
    assert all(p.grad.data_ptr() == moments[p] for p in moments)
    model(images(2)).sum().backward()
    assert all(p.grad.data_ptr() == moments[p] for p in moments)


def test_a_parameter_the_last_pass_does_not_reach_is_stepped_with_what_came_before():
    layers = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    layerwise = LayerwiseStep(layers, optimizer, ThinStep(layers, optimizer))
    before = layers[1].weight.detach().clone()
    x = torch.ones(1, 3)
    layers[1](x).sum().backward()
    with layerwise.last():
        layers[0](x).sum().backward()
    torch.testing.assert_close(layers[1].weight, before - 0.1)
    assert layers[1].weight.grad is None


def test_the_check_sees_a_layers_gradients_before_its_step_and_may_refuse():
    layer = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer.weight.detach().clone()
    seen = []

    def check(name, gradients):
        seen.append((name, len(gradients)))
        raise tt.errors.DivergenceError("no good")

    layerwise = LayerwiseStep(torch.nn.Sequential(layer), optimizer, ThinStep(layer, optimizer), check)
    with pytest.raises(tt.errors.DivergenceError, match="no good"), layerwise.last():
        layer(torch.ones(1, 3)).sum().backward()
    assert seen == [("0", 2)]
    assert torch.equal(layer.weight, before)


def test_a_norm_of_the_whole_gradient_cannot_be_had():
    with pytest.raises(ConfigError, match="clip_norm null"):
        TrainConfig(layerwise_update=True)
