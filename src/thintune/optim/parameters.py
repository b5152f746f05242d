"""Parameter groups, optimizers and the schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from thintune.config import TrainConfig
from thintune.nn import FactorLinear


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of the trainable parameters for an optimizer.

    Weight matrices decay; biases, norms and the left factor do not (its columns are orthonormal, so the decay of
    right alone is the decay of the weight).
    """
    lefts = {id(m.left) for m in model.modules() if isinstance(m, FactorLinear)}
    decayed, plain = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 and id(parameter) not in lefts else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Builds the optimizer over the trainable parameters."""
    groups = parameter_groups(model, config.weight_decay)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def learning_rate_factor(step: int, steps: int, warmup_fraction: float) -> float:
    """Linear warm-up, then a cosine to zero.

    Args:
        step: from 0.
        steps: of the whole run.
        warmup_fraction: share of them over which the rate rises.

    Returns:
        The share of the peak rate, in (0, 1].
    """
    warmup = round(warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
