"""Factors stored in bfloat16: no small step is lost on average, and right makes up for the rounding of left."""

from __future__ import annotations

import torch
from torch import Tensor

from thintune.linalg.subspace import step_coefficients

_CHUNK = 1 << 16
_LARGEST_SKEW = 0.1
"""Share by which a column of left may leave the unit length before the columns are orthonormalised again."""


def stochastic_round_(target: Tensor, source: Tensor) -> Tensor:
    """Rounds to one of the two neighbouring bfloat16 values, with the probability that makes the mean exact.

    A step far below the resolution is taken once in many times instead of never; a value that bfloat16 holds stays.

    Args:
        target: bfloat16, contiguous, overwritten.
        source: float32, of the same shape.

    Returns:
        `target`.
    """
    into, values = target.view(-1), source.reshape(-1)
    for at in range(0, len(values), _CHUNK):
        bits = values[at : at + _CHUNK].view(torch.int32)
        noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
        cut = noise.add_(bits).bitwise_and_(-(1 << 16))
        into[at : at + _CHUNK] = cut.view(torch.float32)
    return target


def rounded_subspace_step_(left: Tensor, right: Tensor, step: Tensor, basis: Tensor, decay: float = 0.0) -> None:
    """`warm_subspace_step` on factors that are stored in bfloat16, in place.

    The new left factor is rounded first; right is then the best one for the rounded left, by least squares,

        right' = (left'.T left')^-1 left'.T (left right + step basis.T),

    so that only its own rounding is left as an error. The columns of left are orthonormalised only when they have
    become skew: without a step nothing changes, and rounding does not add up.

    Args:
        left: (O, K) bfloat16, columns nearly orthonormal.
        right: (K, I) bfloat16.
        step: (O, r) float32.
        basis: (I, r) float32, orthonormal columns.
        decay: right is scaled by 1 - decay first.
    """
    if not (decay or bool(step.any())):
        return
    old, rows = left.float(), right.float().mul_(1 - decay)
    turned = old
    if left.shape[0] > left.shape[1]:
        coefficients = step_coefficients(rows, step.T @ old, basis)
        if bool(torch.isfinite(coefficients).all()):
            turned = torch.addmm(old, step, coefficients)
        lengths = torch.linalg.vector_norm(turned, dim=0)
        if bool(((lengths - 1).abs() > _LARGEST_SKEW).any()):
            turned = torch.linalg.qr(turned)[0].contiguous()
        stochastic_round_(left, turned)
        turned = left.float()
    gram = (turned.T @ turned).double()
    overlap = torch.linalg.solve(gram, (turned.T @ old).double()).float()
    moved = torch.linalg.solve(gram, (turned.T @ step).double()).float()
    stochastic_round_(right, (overlap @ rows).addmm_(moved, basis.T))
