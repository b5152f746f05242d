"""What an optimizer keeps for `update` when the basis moves."""

import pytest
import torch

from thintune.linalg import orthonormalize
from thintune.nn import SubspaceLinear
from thintune.optim import ThinStep

I, O, K, R = 7, 9, 4, 3  # noqa: E741 - the letters of the equations

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-3),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0, rho=0.95),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
    "centred rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True),
}
SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta", "exp_inf")


def layer_and_optimizer(name, refresh_every):
    torch.manual_seed(0)
    layer = SubspaceLinear(I, O, K, activation_rank=R).double()
    layer.start_(orthonormalize(torch.randn(I, R).double()))
    right = torch.randn(K, I).double()
    layer.set_(orthonormalize(torch.randn(O, K).double()), right, torch.zeros(O).double())
    optimizer = OPTIMIZERS[name]([p for p in layer.parameters() if p.requires_grad])
    ThinStep(layer, optimizer, refresh_every=refresh_every)
    return layer, optimizer


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(12, I, generator=generator).double() + 1.0 for _ in range(count)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_stays_finite_and_learns_while_the_basis_moves(name):
    layer, optimizer = layer_and_optimizer(name, refresh_every=2)
    data, losses = batches(40), []
    for x in data:
        loss = layer(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for key, value in optimizer.state[layer.update].items():
            if key in SQUARES:
                assert (value >= 0).all(), key
    assert all(torch.isfinite(p).all() for p in layer.parameters())
    assert not layer.update.any()
    assert sum(losses[-5:]) < sum(losses[:5])


def test_a_centred_variance_stays_one_under_a_steady_gradient():
    layer, _ = layer_and_optimizer("sgd", refresh_every=1000)
    optimizer = torch.optim.RMSprop([layer.update], lr=1e-3, alpha=0.5, centered=True)
    ThinStep(layer, optimizer, refresh_every=20)
    x = batches(1)[0]
    for _ in range(25):
        optimizer.zero_grad()
        layer(x).sum().backward()  # the same gradient at every weight
        optimizer.step()
    assert torch.isfinite(layer.left).all() and torch.isfinite(layer.right).all()
    assert all(torch.isfinite(t).all() for t in optimizer.state[layer.update].values())


def test_first_moments_turn_with_the_basis_and_squares_by_the_squared_turn():
    layer, optimizer = layer_and_optimizer("adamw", refresh_every=3)
    for x in batches(2):
        layer(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    old, old_state = layer.basis.clone(), {k: v.clone() for k, v in optimizer.state[layer.update].items()}
    x = batches(3)[2]
    layer(x).square().mean().backward()
    grad = layer.update.grad.clone()
    optimizer.step()
    turn = old.T @ layer.basis
    assert (layer.basis - old).abs().max() > 1e-2
    first = (0.9 * old_state["exp_avg"] + 0.1 * grad) @ turn
    second = (0.999 * old_state["exp_avg_sq"] + 0.001 * grad.square()) @ turn.square()
    state = optimizer.state[layer.update]
    assert (state["exp_avg"] - first).abs().max() < 1e-12
    assert (state["exp_avg_sq"] - second).abs().max() < 1e-12
    assert state["step"] == 3


def test_a_turn_keeps_what_the_basis_does_not_lose():
    layer, optimizer = layer_and_optimizer("sgd", refresh_every=2)
    x = batches(1)[0] @ layer.basis @ layer.basis.T  # inputs that never leave the basis: it only turns in itself
    for _ in range(2):
        before = optimizer.state[layer.update]["momentum_buffer"].clone() if optimizer.state else None
        layer(x).square().mean().backward()
        grad, old = layer.update.grad.clone(), layer.basis.clone()
        optimizer.step()
        optimizer.zero_grad()
    moved = (0.9 * before + grad) @ old.T
    assert (optimizer.state[layer.update]["momentum_buffer"] @ layer.basis.T - moved).abs().max() < 1e-12
