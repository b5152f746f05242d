"""GaLore's steps against a slow reference, and what it is at full rank."""

import itertools
import sys

import pytest
import torch
from torch import nn

from thintune.config import GaloreConfig, TrainConfig
from thintune.errors import ConfigError, MissingDependencyError
from thintune.optim import LayerwiseStep, ThinStep, build_optimizer
from thintune.optim.galore import Galore, build_galore

pytest.importorskip("pytorch_optimizer")

RANK, GAP, SCALE = 3, 2, 0.5
SHAPES = [(9, 6), (5, 8), (7, 7)]


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def train(kind, **settings):
    return TrainConfig(**{"optimizer": kind, "learning_rate": 0.1, "momentum": 0.8, "weight_decay": 0.3, **settings})


def galore(weights, kind, **settings):
    config = GaloreConfig(**{"rank": RANK, "update_gap": GAP, "scale": SCALE, **settings})
    return Galore([{"params": weights, "weight_decay": 0.3, "projected": True}], train(kind), config)


def reference(weight, gradients, kind):
    """Formed step by step from the equations of the paper (alg. 2), with the rules written out."""
    first = second = None
    weight = weight.clone()
    for step, gradient in enumerate(gradients):
        decayed = gradient + 0.3 * weight if kind == "sgd" else gradient
        if step % GAP == 0:
            u, _, vh = torch.linalg.svd(decayed.float(), full_matrices=False)
            tall = weight.shape[0] >= weight.shape[1]
            basis = (vh[:RANK].T if tall else u[:, :RANK]).double()
        low = decayed @ basis if tall else basis.T @ decayed
        first = torch.zeros_like(low) if first is None else first
        if kind == "sgd":
            first = 0.8 * first + low
            change = first
        else:
            second = torch.zeros_like(low) if second is None else second
            first, second = 0.9 * first + 0.1 * low, 0.999 * second + 0.001 * low.square()
            bias = (1 - 0.9 ** (step + 1)), (1 - 0.999 ** (step + 1))
            change = (first / bias[0]) / ((second / bias[1]).sqrt() + 1e-8)
            weight = weight - 0.1 * 0.3 * weight
        weight = weight - 0.1 * SCALE * (change @ basis.T if tall else basis @ change)
    return weight


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_the_reference(shape, kind):
    weight = nn.Parameter(rand(*shape))
    gradients = [rand(*shape, seed=seed) for seed in range(1, 6)]
    optimizer, start = galore([weight], kind), weight.detach().clone()
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    assert (weight - reference(start, gradients, kind)).abs().max() < 1e-10


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_moments_live_in_the_subspace_which_moves_every_update_gap_steps(kind):
    weight, seen = nn.Parameter(rand(9, 6)), []
    optimizer = galore([weight], kind, update_gap=3)
    for seed in range(1, 8):
        before = weight.detach().clone()
        weight.grad = rand(9, 6, seed=seed)
        optimizer.step()
        seen.append(optimizer.state[weight]["projection"].clone())
        decay = 0.03 * before if kind == "adamw" else 0
        assert torch.linalg.matrix_rank(weight - before + decay, rtol=1e-6) == RANK
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert moved == [False, False, True, False, False, True]
    state = {name: tuple(value.shape) for name, value in optimizer.state[weight].items()}
    kept = {"adamw": {"exp_avg": (9, RANK), "exp_avg_sq": (9, RANK)}, "sgd": {"momentum_buffer": (9, RANK)}}[kind]
    assert state == {"projection": (RANK, 6), "step": (), **kept}


@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_sgd_in_the_subspace_is_sgd(shape):
    weight, plain = (nn.Parameter(rand(*shape).float()) for _ in range(2))
    optimizer = galore([weight], "sgd", rank=min(shape), scale=1.0, update_gap=100)
    dense = torch.optim.SGD([plain], lr=0.1, momentum=0.8, weight_decay=0.3)
    for seed in range(1, 5):
        weight.grad, plain.grad = rand(*shape, seed=seed).float(), rand(*shape, seed=seed).float()
        optimizer.step()
        dense.step()
    assert (weight - plain).abs().max() < 1e-5


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second, self.head = (
            nn.Linear(6, 9),
            nn.LayerNorm(9),
            nn.Linear(9, 5),
            nn.Linear(5, 4),
        )

    def forward(self, x):
        return self.head(self.second(self.norm(self.first(x)).tanh()))


def network():
    torch.manual_seed(0)
    return Net()


def loss(model, seed):
    return model(rand(10, 6, seed=seed).float()).square().sum()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_what_is_not_projected_takes_the_plain_step(kind):
    ours, plain = network(), network()
    optimizer = build_galore(ours, "head", train(kind), GaloreConfig(rank=RANK))
    dense = build_optimizer(plain, train(kind))
    projected = {"first.weight", "second.weight"}
    for seed in range(3):
        for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
            a.grad, b.grad = (rand(*a.shape, seed=seed).float() for _ in range(2))
            assert (name in projected) == any(
                a is p for g in optimizer.param_groups if g["projected"] for p in g["params"]
            )
        optimizer.step()
        dense.step()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b) != (name in projected), name


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_layer_by_layer_it_takes_the_same_bits(kind):
    whole, parts = network(), network()
    for model in (whole, parts):
        optimizer = build_galore(model, "head", train(kind), GaloreConfig(rank=RANK, update_gap=GAP))
        thin_step = ThinStep(model, optimizer)
        layerwise = LayerwiseStep(model, optimizer, thin_step) if model is parts else None
        for seed in range(4):
            if layerwise is None:
                loss(model, seed).backward()
                optimizer.step()
                optimizer.zero_grad()
                continue
            layerwise.begin()
            with layerwise.last():
                loss(model, seed).backward()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(whole.parameters(), network().parameters(), strict=True))


def test_a_gradient_of_zeros_chooses_no_subspace():
    weight = nn.Parameter(rand(9, 6))
    optimizer, before = galore([weight], "adamw"), weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, before) and not optimizer.state[weight]
    weight.grad = gradient = rand(9, 6, seed=1)
    optimizer.step()
    assert (weight - reference(before, [gradient], "adamw")).abs().max() < 1e-10


def test_a_rank_that_leaves_no_layer_is_refused_with_the_limit():
    build_galore(network(), "head", train("adamw"), GaloreConfig(rank=5))
    with pytest.raises(ConfigError, match=r"galore.rank: expected less than .* 6 at most in this model, got 6"):
        build_galore(network(), "head", train("adamw"), GaloreConfig(rank=6))


def test_a_missing_library_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer.optimizer.utils.galore", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'thintune\[bench\]'"):
        build_galore(network(), "head", train("adamw"), GaloreConfig(rank=2))
