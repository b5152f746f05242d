"""The optimizer steps: micro-batches, schedule, loss, and what stops them."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import thintune as tt
from thintune.config import TrainConfig
from thintune.data import epoch_batches
from thintune.errors import DivergenceError
from thintune.optim import ThinStep, build_optimizer, learning_rate_factor
from thintune.train.loop import Loop, first_non_finite_layer


class Rows:
    """A split of random vectors, (n, 3, 12), in five classes."""

    def __init__(self, n, dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(5, (n,), generator=generator)
        self._images = torch.randn(n, 3, 12, generator=generator, dtype=torch.float64).to(dtype)

    def __len__(self):
        return len(self.labels)

    def images(self, indices):
        return self._images[indices]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 20), nn.Linear(20, 16), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()).tanh().mean(1))


def network(method, dtype=torch.float64):
    torch.manual_seed(0)
    model = Net().to(dtype)
    if method != "dense":
        config = tt.ThinConfig(rank=6, activation_rank=5, exclude_modules=["head"])
        config = tt.ThinConfig(exclude_modules=["head"]) if method == "asi" else config
        tt.convert_(model, config, method=method, calibration=[Rows(40, dtype).images(torch.arange(40))])
    return model


def loop(model, split, **settings):
    config = TrainConfig(**{"learning_rate": 1e-2, "batch_size": 10, "epochs": 2, **settings})
    optimizer = build_optimizer(model, config)
    return Loop(model, optimizer, ThinStep(model, optimizer, refresh_every=3), split, config, "cpu")


def go_on(_progress):
    return True


@torch.no_grad()
def outputs(model):
    return model.eval()(Rows(40, next(model.parameters()).dtype).images(torch.arange(40)))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("method", ["thin", "wsi", "dense"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_micro_batches_add_up_to_the_batch(method, optimizer, dtype, tolerance):
    found = []
    for micro_batch in (None, 3):  # 10 = 3 + 3 + 3 + 1, and the last batch is 7 = 3 + 3 + 1
        model = network(method, dtype)
        # SGD: an adaptive step divides by a gradient that may be rounding alone; its rate is kept small
        rate = 1e-2 if optimizer == "sgd" else 1e-4
        steps = loop(
            model,
            Rows(27, dtype),
            micro_batch=micro_batch,
            optimizer=optimizer,
            learning_rate=rate,
            label_smoothing=0.1,
        )
        assert steps.run(go_on) and steps.progress.step == 6
        found.append((outputs(model), torch.tensor(steps.progress.epoch_losses)))
    (whole, whole_losses), (parts, parts_losses) = found
    assert (whole - parts).abs().max() < tolerance and (whole_losses - parts_losses).abs().max() < tolerance
    assert (whole - outputs(network(method, dtype))).abs().max() > 100 * tolerance


def test_the_loss_is_the_mean_over_the_batch_with_smoothing_and_the_order_that_of_the_epoch():
    model, split = network("dense"), Rows(27)
    steps = loop(model, split, learning_rate=1e-30, label_smoothing=0.2, epochs=1)
    steps.run(go_on)
    batches = epoch_batches(27, 10, 0, 0)
    wanted = [F.cross_entropy(model(split.images(b)), split.labels[b], label_smoothing=0.2).item() for b in batches]
    assert [len(b) for b in batches] == [10, 10, 7]
    assert steps.progress.epoch_losses == pytest.approx(wanted, rel=1e-12)
    plain = F.cross_entropy(model(split.images(batches[0])), split.labels[batches[0]]).item()
    assert abs(plain - wanted[0]) > 1e-3


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_dense_steps_are_those_of_a_plain_loop(optimizer):
    model, split = network("dense"), Rows(27)
    loop(model, split, optimizer=optimizer, clip_norm=0.05, max_steps=4).run(go_on)
    plain = network("dense")
    config = TrainConfig(learning_rate=1e-2, optimizer=optimizer)
    stepper = build_optimizer(plain, config)
    batches = [*epoch_batches(27, 10, 0, 0), *epoch_batches(27, 10, 0, 1)]
    for step in range(4):
        for group in stepper.param_groups:
            group["lr"] = 1e-2 * learning_rate_factor(step, 4, 0.1)
        stepper.zero_grad()
        F.cross_entropy(plain(split.images(batches[step])), split.labels[batches[step]]).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        stepper.step()
    assert (outputs(model) - outputs(plain)).abs().max() < 1e-12


def test_clipping_bounds_the_step_and_null_turns_it_off():
    moved = {}
    for limit in (1e-3, 1e9, None):
        model = network("dense")
        steps = loop(model, Rows(10), optimizer="sgd", weight_decay=0.0, clip_norm=limit, max_steps=1)
        steps.run(go_on)
        before = network("dense")
        pairs = zip(model.parameters(), before.parameters(), strict=True)
        moved[limit] = math.sqrt(sum((a - b).square().sum().item() for a, b in pairs))
    assert moved[1e-3] == pytest.approx(1e-2 * 1e-3, rel=1e-3)
    assert moved[None] == pytest.approx(moved[1e9], rel=1e-12) and moved[None] > 100 * moved[1e-3]


def test_the_rate_rises_linearly_and_falls_as_a_cosine():
    factors = [learning_rate_factor(step, 40, 0.25) for step in range(40)]
    assert factors[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert factors[10] == 1.0 and factors[25] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert 0 < factors[-1] < 0.01
    assert learning_rate_factor(0, 1, 0.0) == 1.0 and learning_rate_factor(0, 5, 0.0) == 1.0


def test_the_optimizer_gets_the_rate_of_the_schedule():
    model, rates = network("dense"), []
    steps = loop(model, Rows(20), epochs=3, warmup_fraction=0.5)
    steps.run(lambda _progress: rates.append(steps.optimizer.param_groups[-1]["lr"]) or True)
    assert rates == [1e-2 * learning_rate_factor(i, 6, 0.5) for i in range(6)]


@pytest.mark.parametrize(("max_steps", "done"), [(None, 6), (4, 4), (100, 6)])
def test_the_run_ends_after_its_epochs_or_max_steps(max_steps, done):
    steps = loop(network("dense"), Rows(27), max_steps=max_steps)
    assert steps.run(go_on) and steps.progress.step == done
    assert len(steps.progress.epoch_losses) == done - 3
    assert len(steps.progress.step_times_s) == {6: 3, 4: 2}[done]  # neither the first step nor short batches


def test_after_step_can_stop_the_run_and_the_same_loop_goes_on():
    whole, cut = network("thin"), network("thin")
    loop(whole, Rows(27)).run(go_on)
    steps = loop(cut, Rows(27))
    assert not steps.run(lambda progress: progress.step < 4)
    assert steps.progress.step == 4
    assert steps.run(go_on) and steps.progress.step == 6
    assert torch.equal(outputs(whole), outputs(cut)) and len(steps.progress.epoch_losses) == 3


def weight_of(layer):
    """What the layer computes with: the factor, the weight."""
    return layer.weight if hasattr(layer, "weight") else layer.left


@pytest.mark.parametrize("method", ["thin", "wsi", "wasi", "asi", "amc", "dense"])
def test_a_loss_that_is_not_finite_names_step_and_layer(method):
    model = network(method, torch.float32)
    steps = loop(model, Rows(40, torch.float32))

    def poison(progress):
        if progress.step == 2:
            weight_of(model.second).data[3, 2] = float("nan")
        return True

    with pytest.raises(DivergenceError, match=r"^step 3: loss is nan, first seen at second;"):
        steps.run(poison)
    assert steps.progress.step == 2
    assert torch.isfinite(model.first(Rows(4, torch.float32).images(torch.arange(4)))).all()


def test_a_gradient_that_is_not_finite_names_its_parameter_and_changes_nothing():
    model = network("dense")
    model.second.weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), math.inf))
    before = outputs(model)
    with pytest.raises(DivergenceError, match=r"^step 1: gradient norm is inf, first seen at second\.weight"):
        loop(model, Rows(27)).run(go_on)
    model.second.weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(DivergenceError, match=r"^step 1: gradient norm is nan, first seen at second\.weight"):
        loop(model, Rows(27)).run(go_on)
    assert torch.equal(outputs(model), before)


def test_an_infinite_rate_is_noticed_one_step_later():
    model = network("dense", torch.float32)
    steps = loop(model, Rows(40, torch.float32), learning_rate=1e38, optimizer="sgd", clip_norm=None)
    with pytest.raises(DivergenceError, match=r"^step \d+: (loss|gradient norm) is (nan|inf)"):
        steps.run(go_on)


def test_the_first_layer_in_order_of_execution_is_named():
    model = network("dense")
    x = Rows(4).images(torch.arange(4))
    assert first_non_finite_layer(model, x) == "the loss"
    model.head.bias.data[0] = math.inf
    assert first_non_finite_layer(model, x) == "head"
    model.first.bias.data[0] = math.nan
    assert first_non_finite_layer(model, x) == "first"
    assert not any(module._forward_hooks for module in model.modules())


def test_saved_bytes_and_flops_are_those_of_the_first_micro_batch_and_of_the_whole_step():
    found = {}
    for micro_batch in (None, 5):
        steps = loop(network("dense"), Rows(10), micro_batch=micro_batch, max_steps=1)
        steps.run(go_on)
        found[micro_batch] = steps.progress
    assert (
        found[None].flops_per_step
        == found[5].flops_per_step
        == 2 * 10 * 3 * (2 * 12 * 20 + 3 * 20 * 16) + 10 * (3 * 2 * 16 * 5)
    )
    whole, half = (progress.saved_activation_bytes for progress in found.values())
    assert 0 < half < whole and 0 <= 2 * half - whole < 100  # all but a few numbers that every loss keeps
