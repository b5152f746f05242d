"""Small transformers whose sizes all differ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES, HIDDEN, CLASSES = 24, 40, 5


class Block(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES)
        self.fc1 = nn.Linear(FEATURES, HIDDEN, bias)
        self.fc2 = nn.Linear(HIDDEN, FEATURES, bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class Net(nn.Module):
    """Maps (..., 24) to (..., 5)."""

    def __init__(self, depth: int = 2, bias: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(bias) for _ in range(depth))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.drop(x))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def make() -> Callable[..., Net]:
    """A new network in float64."""

    def build(depth: int = 2, bias: bool = True) -> Net:
        return Net(depth, bias).double()

    return build


@pytest.fixture
def net(make) -> Net:
    return make()


@pytest.fixture
def inputs() -> Callable[..., Tensor]:
    """Inputs (..., 24) with a spectrum that falls off and a mean."""
    scales = torch.logspace(0, -1.5, FEATURES, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(FEATURES, FEATURES, dtype=torch.float64))[0]

    def draw(*leading: int) -> Tensor:
        return (torch.randn(*leading, FEATURES, dtype=torch.float64) * scales) @ turn + 0.3

    return draw
