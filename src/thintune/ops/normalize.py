"""Layer normalisation whose backward pass reads a low-bit copy of the normalised input.

With x^ = (x - mean) / std and y = gamma x^ + beta, the gradient of x is
(d - mean(d) - x^ mean(d x^)) / std for d = gamma dy: x^ enters only through its own mean product with d and through
the gradient of gamma. An 8-bit copy of x^ is therefore enough for an input gradient that is almost exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thintune.ops.workspace import workspace

LEVELS = 127
"""Steps of the 8-bit copy on either side of zero."""


def normalize_rows(rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x^ (M, D) of every row and 1 / std (M, 1), without the affine part."""
    normal, _, rstd = torch.native_layer_norm(rows, (rows.shape[-1],), None, None, eps)
    return normal, rstd


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds every row to 8 bits by its own largest magnitude.

    Args:
        rows: (M, D).

    Returns:
        (M, D) int8 and the size of one step (M, 1); |rows - values * step| <= step / 2.
    """
    values = torch.empty_like(rows, dtype=torch.int8)
    step = rows.new_empty(len(rows), 1)
    quantize_rows_into(rows, values, step)
    return values, step


def quantize_rows_into(rows: Tensor, values: Tensor, step: Tensor) -> None:
    """`quantize_rows` to memory that is there: values (M, D) int8 and step (M, 1)."""
    scratch = workspace.take("narrow", tuple(rows.shape), rows)
    largest = torch.abs(rows, out=scratch).amax(1, keepdim=True).clamp_min_(1e-30)
    torch.div(largest, LEVELS, out=step)
    values.copy_(torch.div(rows, step, out=scratch).round_())


def dequantize_rows(values: Tensor, step: Tensor) -> Tensor:
    """(M, D) back to the type of `step`, valid until the next call; a copy that was kept whole comes back as it is."""
    if values.is_floating_point():
        return values
    return workspace.take("narrow", tuple(values.shape), step).copy_(values).mul_(step)


def normalization_gradients(
    grad: Tensor, normal: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients through y = gamma x^ + beta and the normalisation, short of the factor 1 / std.

    Args:
        grad: (M, D) gradient of y.
        normal: (M, D) x^, perhaps a low-bit copy.
        weight: (D,) gamma, or None for 1.

    Returns:
        (M, D) std times the gradient of x, and those of gamma and beta (D,), None without a weight.
    """
    m, d = grad.shape
    unit, zero = grad.new_ones(m, 1), grad.new_zeros(m, 1)
    affine = weight is not None
    return torch.ops.aten.native_layer_norm_backward(
        grad, normal, [d], zero, unit, weight, weight, [True, affine, affine]
    )


class _LeanLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        normal, rstd = normalize_rows(rows, eps)
        values, step = quantize_rows(normal)
        ctx.save_for_backward(values, step, rstd, weight)
        ctx.has_bias = bias is not None
        if weight is not None:
            normal.mul_(weight)
        if bias is not None:
            normal.add_(bias)
        return normal.reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, step, rstd, weight = ctx.saved_tensors
        rows = grads[0].reshape(-1, values.shape[1])
        grad_x, grad_weight, grad_bias = normalization_gradients(rows, dequantize_rows(values, step), weight)
        return grad_x.mul_(rstd).reshape(grads[0].shape), grad_weight, grad_bias if ctx.has_bias else None, None


def lean_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalisation over the last axis, as `torch.nn.functional.layer_norm`.

    Args:
        x: (..., D).
        weight: gamma (D,) or None.
        bias: beta (D,) or None.
        eps: added to the variance.

    Returns:
        (..., D). Saves for backward M D + 8 M bytes (float32): the 8-bit copy, and a step and 1 / std a row.
    """
    result = _LeanLayerNorm.apply(x, weight, bias, eps)
    assert isinstance(result, Tensor)
    return result
