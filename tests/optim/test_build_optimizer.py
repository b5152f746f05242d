import itertools

import pytest
import torch
from torch import nn

from thintune.config import TrainConfig
from thintune.nn import FactorLinear, SubspaceLinear, ThinLinear
from thintune.optim import build_optimizer, learning_rate_factor


def model():
    layers = nn.ModuleDict(
        {
            "dense": nn.Linear(5, 4),
            "norm": nn.LayerNorm(4),
            "subspace": SubspaceLinear(4, 6, 2, activation_rank=3),
            "factor": FactorLinear(6, 7, 3),
            "thin": ThinLinear(7, 3, 2),
        }
    )
    layers["thin"].requires_grad_(False)
    return layers


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_weights_decay_and_biases_norms_and_orthonormal_factors_do_not(kind):
    layers = model()
    config = TrainConfig(optimizer=kind, learning_rate=0.1, momentum=0.8, weight_decay=0.3)
    optimizer = build_optimizer(layers, config)
    assert isinstance(optimizer, {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[kind])
    names = {id(p): name for name, p in layers.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    decayed = {"dense.weight", "subspace.update", "factor.right"}
    assert {name for name, value in decay.items() if value == 0.3} == decayed
    assert decay.keys() - decayed == {
        *("dense.bias", "norm.weight", "norm.bias", "subspace.bias", "factor.left", "factor.bias"),
    }
    assert all(group["lr"] == 0.1 for group in optimizer.param_groups)
    if kind == "sgd":
        assert all(group["momentum"] == 0.8 for group in optimizer.param_groups)


def test_the_rate_rises_linearly_then_falls_to_nearly_zero():
    factors = [learning_rate_factor(step, 20, 0.2) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in itertools.pairwise(factors[4:]))
    assert 0 < factors[-1] < 0.02


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 0.9), (3, 0.99)])
def test_short_runs_have_positive_rates(steps, warmup):
    assert all(0 < learning_rate_factor(step, steps, warmup) <= 1 for step in range(steps))
