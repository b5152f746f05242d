"""Factors stored in bfloat16: no small step is lost on average, and right makes up for the rounding of left."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from thintune.linalg.orthonormal import orthonormalize
from thintune.linalg.subspace import moved_gram, step_coefficients, upper_factor

_CHUNK = 1 << 16
_ROWS = 256
"""Rows of left and columns of right that are there in float32 at a time."""
_Turn = Callable[[slice, Tensor], Tensor]
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
    become skew: without a step nothing changes, and rounding does not add up. Scratch is a few K^2 and some rows of
    either factor in float32.

    Args:
        left: (O, K) bfloat16, columns nearly orthonormal.
        right: (K, I) bfloat16.
        step: (O, r) float32.
        basis: (I, r) float32, orthonormal columns.
        decay: right is scaled by 1 - decay first.
    """
    if not (decay or bool(step.any())):
        return
    turn = None if left.shape[0] == left.shape[1] else _turn(left, right, step, basis, 1 - decay)
    gram, overlap = step.new_zeros(left.shape[1], left.shape[1]), step.new_zeros(left.shape[1], left.shape[1])
    moved = step.new_zeros(left.shape[1], step.shape[1])
    for rows in _slices(len(left)):
        old = new = left[rows].float()
        if turn is not None:
            stochastic_round_(left[rows], turn(rows, old))
            new = left[rows].float()
        gram.addmm_(new.T, new)
        overlap.addmm_(new.T, old)
        moved.addmm_(new.T, step[rows])
    both = torch.linalg.solve(gram.double(), torch.cat([overlap, moved], 1).double())
    del gram
    overlap, moved = both[:, : left.shape[1]].float().mul_(1 - decay), both[:, left.shape[1] :].float()
    del both
    for columns in _slices(right.shape[1]):
        part = (overlap @ right[:, columns].float()).addmm_(moved, basis[columns].T)
        right[:, columns] = stochastic_round_(torch.empty_like(part, dtype=right.dtype), part)


def _slices(length: int) -> list[slice]:
    return [slice(at, at + _ROWS) for at in range(0, length, _ROWS)]


def _turn(left: Tensor, right: Tensor, step: Tensor, basis: Tensor, scale: float) -> _Turn | None:
    """How rows of left turn to the step; None where they stay, since it has nothing in common with the weight."""
    shared, inner = step.new_zeros(step.shape[1], left.shape[1]), step.new_zeros(left.shape[1], left.shape[1])
    for rows in _slices(len(left)):
        part = left[rows].float()
        shared.addmm_(step[rows].T, part)
        inner.addmm_(part.T, part)
    seen, gram = step.new_zeros(left.shape[1], basis.shape[1]), torch.zeros_like(inner)
    for columns in _slices(right.shape[1]):
        part = right[:, columns].float().mul_(scale)
        seen.addmm_(part, basis[columns])
        gram.addmm_(part, part.T)
    coefficients = step_coefficients(seen, gram, shared, basis)
    if not bool(torch.isfinite(coefficients).all()):
        return None
    turned_gram = moved_gram(inner, shared, step, coefficients)
    lengths = turned_gram.diagonal().clamp(min=0).sqrt()
    if not bool(((lengths - 1).abs() > _LARGEST_SKEW).any()):
        return lambda rows, old: torch.addmm(old, step[rows], coefficients)
    upper = upper_factor(turned_gram)
    if upper is None:  # far from orthonormal: rare enough to be done whole
        whole = orthonormalize(torch.addmm(left.float(), step, coefficients))
        return lambda rows, _: whole[rows]
    upper = upper.float()
    return lambda rows, old: torch.linalg.solve_triangular(
        upper, torch.addmm(old, step[rows], coefficients), upper=True, left=False
    )
