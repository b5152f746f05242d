"""Low-rank linear layer whose gradient lives in a fixed subspace of its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thintune.ops.products import linear


class _SubspaceLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, update: Tensor, basis: Tensor
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        output = linear(linear(rows, right.to(x.dtype)), left.to(x.dtype), bias)
        ctx.save_for_backward(rows @ basis if ctx.needs_input_grad[4] else None, left, right)
        ctx.has_bias = bias is not None
        return output.reshape(*x.shape[:-1], left.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        kept, left, right = ctx.saved_tensors
        need_x, _, _, need_bias, need_update, _ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = None
        if need_x:
            reduced = linear(rows, left.to(grad.dtype).T)
            grad_x = linear(reduced, right.to(grad.dtype).T).view(*grad.shape[:-1], right.shape[1])
        grad_bias = rows.sum(0) if ctx.has_bias and need_bias else None
        grad_update = rows.T @ kept if need_update else None
        return grad_x, None, None, grad_bias, grad_update, None


def subspace_linear(
    x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, update: Tensor, basis: Tensor
) -> Tensor:
    """Y = (x R.T) L.T + b, the weight being L R + update U.T at update = 0.

    The gradient of `update` is A = G.T (x U): the weight gradient restricted to the span of U (arXiv 2510.09160,
    sec. 3, with the feature mode alone). While U stands still, gradients of micro-batches add up exactly in A.

    Args:
        x: (..., I).
        left: (O, K), takes no gradient; may be stored in a narrower type than x.
        right: (K, I), takes no gradient; likewise.
        bias: (O,) or None.
        update: (O, r), all zeros; its value is not read.
        basis: U (I, r), orthonormal columns, takes no gradient.

    Returns:
        (..., O). Saves for backward the projection x U, M * r values, and no copy of x.
    """
    result = _SubspaceLinear.apply(x, left, right, bias, update, basis)
    assert isinstance(result, Tensor)
    return result
