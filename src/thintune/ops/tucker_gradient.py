"""The weight gradient of a layer whose input is kept as a Tucker form."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from thintune.linalg.tucker import mode_dot


def tucker_weight_gradient(grad: Tensor, core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """A with D = G.T x~ = A U.T, U the last factor, without forming x~ or D (arXiv 2510.09160, eq. of ASI's gradient).

    Either contracts G with the leading factors first, or multiplies the leading modes of the core out; whichever
    costs fewer FLOPs.

    Args:
        grad: G (n_1, ..., n_m, O).
        core: (r_1, ..., r_m, r).
        factors: U_i (n_i, r_i) for each leading mode, then U (I, r).

    Returns:
        A (O, r).
    """
    leading = list(factors[:-1])
    if _cost(grad.shape, [f.shape[1] for f in leading]) <= _cost(core.shape, [f.shape[0] for f in leading]) + (
        2 * math.prod(grad.shape) * core.shape[-1]
    ):
        for mode in sorted(range(len(leading)), key=lambda m: leading[m].shape[1] / leading[m].shape[0]):
            grad = mode_dot(grad, leading[mode].T, mode)
    else:
        for mode, factor in enumerate(leading):
            core = mode_dot(core, factor, mode)
    return grad.reshape(-1, grad.shape[-1]).T @ core.reshape(-1, core.shape[-1])


def _cost(shape: Sequence[int], new_sizes: Sequence[int]) -> int:
    """FLOPs of multiplying the leading modes of a tensor to new sizes, those that shrink most first."""
    sizes, total = list(shape), 0
    for mode in sorted(range(len(new_sizes)), key=lambda m: new_sizes[m] / shape[m]):
        total += 2 * math.prod(sizes) * new_sizes[mode]
        sizes[mode] = new_sizes[mode]
    return total
