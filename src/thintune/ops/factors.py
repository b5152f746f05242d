"""Low-rank linear layer that gives the exact gradients of both factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thintune.ops.tucker_gradient import tucker_weight_gradient


class _FactorLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, core: Tensor | None, *factors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(left, right, *([x] if core is None else [core, *factors]))
        ctx.has_bias = bias is not None
        ctx.count = len(factors)
        return F.linear(F.linear(x, right), left, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        left, right, *kept = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        inner = rows @ left
        grad_x = (inner @ right).reshape(*grad.shape[:-1], right.shape[1]) if ctx.needs_input_grad[0] else None
        if len(kept) == 1:
            inputs = kept[0].reshape(-1, right.shape[1])
            grad_left, grad_right = rows.T @ (inputs @ right.T), inner.T @ inputs
        else:
            core, *factors = kept
            a, basis = tucker_weight_gradient(grad, core, factors), factors[-1]
            grad_left, grad_right = a @ (right @ basis).T, (left.T @ a) @ basis.T
        grad_bias = rows.sum(0) if ctx.has_bias else None
        return grad_x, grad_left, grad_right, grad_bias, None, *([None] * ctx.count)


def factor_linear(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    core: Tensor | None = None,
    factors: Sequence[Tensor] = (),
) -> Tensor:
    """Y = (x R.T) L.T + b with the chain rule for both factors: dL = A (R U).T, dR = (L.T A) U.T.

    A U.T is the weight gradient D for the kept input x~ (arXiv 2510.09160, sec. 3); D itself is never formed.

    Args:
        x: (..., I).
        left: (O, K).
        right: (K, I).
        bias: (O,) or None.
        core: (r_1, ..., r) of x's Tucker form, or None to keep x whole.
        factors: (n_i, r_i) of every mode of x, the last of them U (I, r).

    Returns:
        (..., O). Saves for backward the Tucker form, or x.
    """
    result = _FactorLinear.apply(x, left, right, bias, core, *factors)
    assert isinstance(result, Tensor)
    return result
