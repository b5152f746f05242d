"""Slow readable twins of the autograd functions: they form x~ and D = G.T x~. For tests and for reading."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from thintune.linalg.tucker import reconstruct
from thintune.ops.branches import BranchOptions, ThinWeights


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


def thin_reference(x: Tensor, layer: ThinWeights) -> Tensor:
    """A thin layer as its merged weight L R + update U.T; for autograd. The input is projected for the update alone."""
    return F.linear(x, layer.left @ layer.right, layer.bias) + (x.detach() @ layer.basis) @ layer.update.T


def mlp_branch_reference(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    layer_scale: Tensor | None,
    first: ThinWeights,
    second: ThinWeights,
    options: BranchOptions,
) -> Tensor:
    """Twin of `mlp_branch`, for autograd."""
    inner = F.gelu(thin_reference(F.layer_norm(x, gamma.shape, gamma, beta, options.eps), first))
    out = thin_reference(inner, second)
    return x + (out if layer_scale is None else layer_scale * out)


def attention_branch_reference(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    layer_scale: Tensor | None,
    first: ThinWeights,
    second: ThinWeights,
    options: BranchOptions,
) -> Tensor:
    """Twin of `attention_branch`, for autograd: forms the softmax."""
    images, tokens, width = x.shape
    qkv = thin_reference(F.layer_norm(x, gamma.shape, gamma, beta, options.eps), first)
    q, k, v = qkv.reshape(images, tokens, 3, options.heads, width // options.heads).permute(2, 0, 3, 1, 4)
    scale = (width // options.heads) ** -0.5 if options.scale is None else options.scale
    mixed = (scale * q @ k.transpose(-1, -2)).softmax(-1) @ v
    out = thin_reference(mixed.transpose(1, 2).reshape(x.shape), second)
    return x + (out if layer_scale is None else layer_scale * out)
