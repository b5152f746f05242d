"""Dense linear layer that keeps its input as a Tucker form (ASI)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thintune.ops.tucker_gradient import tucker_weight_gradient


class _CompressedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, core: Tensor, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(weight, core, *factors)
        ctx.has_bias = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight, core, *factors = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = tucker_weight_gradient(grad, core, factors) @ factors[-1].T
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, None, *([None] * len(factors))


def compressed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, core: Tensor, factors: Sequence[Tensor]
) -> Tensor:
    """Y = x W.T + b, with the weight gradient taken from a Tucker form of x (ASI, arXiv 2505.05086).

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,) or None.
        core: (r_1, ..., r) of x's Tucker form.
        factors: (n_i, r_i) of every mode of x.

    Returns:
        (..., O). Saves for backward core and factors. The weight is dense, so its gradient is O x I.
    """
    result = _CompressedLinear.apply(x, weight, bias, core, *factors)
    assert isinstance(result, Tensor)
    return result
