"""Slow readable twins of the autograd functions: they form x~ and D = G.T x~. For tests and for reading."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thintune.linalg.tucker import reconstruct


def weight_gradient(grad: Tensor, kept_input: Tensor) -> Tensor:
    """D (O, I) = sum over all leading axes of g x~.T."""
    return torch.einsum("mo,mi->oi", grad.flatten(0, -2), kept_input.flatten(0, -2))


def subspace_gradients(
    x: Tensor, left: Tensor, right: Tensor, basis: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, bias and update of `subspace_linear`, through the merged weight."""
    weight = left @ right
    kept = x @ basis @ basis.T
    return grad @ weight, grad.flatten(0, -2).sum(0), weight_gradient(grad, kept) @ basis


def factor_gradients(
    x: Tensor, left: Tensor, right: Tensor, grad: Tensor, core: Tensor | None = None, factors: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, left, right and bias of `factor_linear`, by the chain rule from D."""
    kept = x if core is None else reconstruct(core, factors)
    d = weight_gradient(grad, kept)
    return grad @ (left @ right), d @ right.T, left.T @ d, grad.flatten(0, -2).sum(0)


def compressed_gradients(
    weight: Tensor, grad: Tensor, core: Tensor, factors: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias of `compressed_linear`."""
    return grad @ weight, weight_gradient(grad, reconstruct(core, factors)), grad.flatten(0, -2).sum(0)
