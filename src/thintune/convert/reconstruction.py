"""Label-free reconstruction: a converted block learns to return what the dense block returned.

The factors of each layer are the best ones for that layer alone, on inputs that the blocks before it have changed
already. A few Adam steps on a block's own parameters let its layers make up for one another, and for what the blocks
before lost: the target is the output of the dense block on the dense path (AdaRound's layer-wise objective, arXiv
2004.10568, on blocks as in BRECQ, arXiv 2102.05426). Nothing but one block runs, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thintune.convert.calibration import Call, evaluating
from thintune.linalg import orthonormalize
from thintune.nn import SubspaceLinear

LEARNING_RATE = 4e-3
"""Of Adam, in units of each parameter's own root mean square."""
_LEAST_SIZE = 4e-3
"""Root mean square that parameters are taken to have at least, zeros among them."""
_BETAS = (0.9, 0.99)
STEP_ROWS = 1024
"""Rows (images x tokens) of a step; small batches are gathered until there are as many, one at a time in memory."""
_WARM_UP = 5
"""Steps until the full rate, which then falls to zero along half a cosine."""


@dataclass
class Errors:
    """Mean squared error of a block's output before and after, as a share of the output's variance."""

    before: float
    after: float


def reconstruct_(
    block: nn.Module, calls: Sequence[Call], targets: Sequence[Tensor], steps: int, seed: int = 0
) -> Errors:
    """Trains factors, biases and norms of one converted block to return the targets, in place.

    Args:
        block: holds `SubspaceLinear` layers; its biases, norms and scales are trained as well unless they are frozen.
        calls: arguments of the block on the converted path, batch by batch; the tensors are not changed.
        targets: what the dense block returned on the dense path, batch by batch.
        steps: of Adam, on batches in an order that is shuffled anew each time all were seen.
        seed: of that order; no other random number is drawn.

    Returns:
        Errors over all batches. The left factors are orthonormal to rounding, their product with right is what was
        trained; bases, updates, types and what takes gradients are as they were.
    """
    layers = [module for module in block.modules() if isinstance(module, SubspaceLinear)]
    stored = [layer.left.dtype for layer in layers]
    trained = {name: p.requires_grad for name, p in block.named_parameters()}
    _free_factors_(layers)
    try:
        with evaluating(block):
            scale = _inverse_variance(targets)
            before = _error(block, calls, targets, scale)
            _train_(block, calls, targets, scale, steps, seed)
            _orthonormal_(layers)
            after = _error(block, calls, targets, scale)
    finally:
        for name, parameter in block.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(trained[name])
        for layer, dtype in zip(layers, stored, strict=True):
            if layer.left.dtype != dtype:
                layer.store_(dtype)
    return Errors(before, after)


def _free_factors_(layers: Sequence[SubspaceLinear]) -> None:
    """Lets factors take gradients instead of updates, in the type that is computed in."""
    for layer in layers:
        if layer.left.dtype != layer.update.dtype:
            layer.store_(layer.update.dtype)
        layer.update.requires_grad_(False)
        layer.left.requires_grad_(True)
        layer.right.requires_grad_(True)


def _orthonormal_(layers: Sequence[SubspaceLinear]) -> None:
    for layer in layers:
        left = orthonormalize(layer.left)
        layer.right.copy_((left.T @ layer.left) @ layer.right)
        layer.left.copy_(left)


def _inverse_variance(targets: Sequence[Tensor]) -> float:
    """One over the variance of a row of the targets, summed over its features; 1 where they do not vary."""
    rows = sum(_rows(target) for target in targets)
    mean = sum(target.flatten(0, -2).double().sum(0) for target in targets) / rows
    spread = sum(float((target - mean).double().square().sum()) for target in targets) / rows
    return 1 / spread if spread > 0 else 1.0


def _rows(target: Tensor) -> int:
    return target.shape[:-1].numel()


def _error(block: nn.Module, calls: Sequence[Call], targets: Sequence[Tensor], scale: float) -> float:
    lost = sum(
        float((block(*call.args, **call.kwargs) - target).square().sum())
        for call, target in zip(calls, targets, strict=True)
    )
    return lost * scale / sum(_rows(target) for target in targets)


def _train_(
    block: nn.Module, calls: Sequence[Call], targets: Sequence[Tensor], scale: float, steps: int, seed: int
) -> None:
    factors = {id(p) for m in block.modules() if isinstance(m, SubspaceLinear) for p in (m.left, m.right)}
    parameters = [p for p in block.parameters() if p.requires_grad and (p.ndim <= 1 or id(p) in factors)]
    sizes = [LEARNING_RATE * max(float(p.detach().square().mean().sqrt()), _LEAST_SIZE) for p in parameters]
    groups = [{"params": [p], "lr": size} for p, size in zip(parameters, sizes, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=_BETAS)
    order = _shuffled(len(calls), seed)
    for step in range(steps):
        factor = min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, size in zip(optimizer.param_groups, sizes, strict=True):
            group["lr"] = factor * size
        optimizer.zero_grad()
        for number in _enough(order, targets):
            call = calls[number]
            with torch.enable_grad():
                lost = (block(*call.args, **call.kwargs) - targets[number]).square().sum() * scale
            lost.backward()  # a sum: Adam does not see how many rows a step has
            del lost
        optimizer.step()


def _shuffled(count: int, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _enough(order: Iterator[int], targets: Sequence[Tensor]) -> Iterator[int]:
    """Numbers of batches, no more than all of them, until they have the rows of a step."""
    rows = 0
    for _ in range(len(targets)):
        number = next(order)
        rows += _rows(targets[number])
        yield number
        if rows >= STEP_ROWS:
            return
