"""Warm-started subspace iteration and the exact step of a low-rank weight.

A weight W = left @ right meets an update of known right factor, W' = W + step @ basis.T, and is brought back to rank K
by one subspace iteration from the previous basis. Nothing of size O x I is formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thintune.linalg.orthonormal import orthonormalize

_SKEW = 0.5
"""Largest departure from the identity of a gram matrix, whose condition is then at most 3, that one pass makes good."""


def subspace_iteration(matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One step of subspace iteration from a warm basis (WSI, arXiv 2510.09160).

    The right factor is expressed in the *new* basis. Pairing the new basis with coordinates in the old one is the
    fault of the published code: an orthonormalisation is free to flip or turn the columns.

    Args:
        matrix: (O, I).
        basis: (O, K), orthonormal columns, from the previous step.

    Returns:
        left (O, K) with orthonormal columns and right (K, I) = left.T @ matrix.
    """
    left = orthonormalize(matrix @ (matrix.T @ basis))
    return left, left.T @ matrix


def warm_subspace_step_reference(left: Tensor, right: Tensor, step: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Slow readable twin of `warm_subspace_step`: forms W', iterates once. For tests."""
    return subspace_iteration(left @ right + step @ basis.T, left)


def warm_subspace_step(left: Tensor, right: Tensor, step: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """`warm_subspace_step_` on copies."""
    left, right = left.clone(), right.clone()
    warm_subspace_step_(left, right, step, basis)
    return left, right


def warm_subspace_step_(left: Tensor, right: Tensor, step: Tensor, basis: Tensor) -> None:
    """One subspace iteration on W + step @ basis.T, without forming it, in place.

    With moved = right + (left.T step) basis.T, the coordinates of W' in the old basis, the iteration's column space is
    that of W' moved.T = left (right moved.T) + step (basis.T moved.T). Multiplying by the inverse of the K x K matrix
    right @ moved.T leaves the space as it is and makes the columns nearly orthonormal:

        left' = orth(left + step C) = (left + step C) T^-1,   C = (basis.T moved.T) (right moved.T)^-1
        right' = (left'.T left) right + (left'.T step) basis.T

    so that left' turns as little as it must and quantities stored in the old basis stay meaningful. T is a triangular
    factor of the gram matrix, which along with left'.T left = T^-T (left.T left + C.T step.T left) needs no second
    (O, K) matrix; scratch is a few K^2 in float64 and a chunk of either factor. Since the gram matrix of left is
    taken anew every time, rounding does not add up over steps.

    Args:
        left: (O, K), orthonormal columns; overwritten.
        right: (K, I); overwritten.
        step: (O, r), the update in coordinates of `basis`.
        basis: (I, r), orthonormal columns.
    """
    if left.shape[0] == left.shape[1]:  # a square basis spans everything: only the coordinates move
        right.addmm_(left.T @ step, basis.T)
        return
    shared, overlap = step.T @ left, left.T @ left
    coefficients = step_coefficients(right @ basis, right @ right.T, shared, basis)
    gram = moved_gram(overlap, shared, step, coefficients)
    upper = upper_factor(gram) if bool(torch.isfinite(coefficients).all()) else None
    if upper is None:
        _far_step_(left, right, step, basis, coefficients)
        return
    left.addmm_(step, coefficients)
    overlap = _solve_(left, upper, overlap.addmm_(coefficients.T, shared))
    gram.diagonal().sub_(1)
    if float(gram.norm()) > _SKEW:  # rounding grows by the condition of the gram matrix: a second time
        upper = upper_factor((left.T @ left).double())
        assert upper is not None
        overlap = _solve_(left, upper, overlap)
    _set_right_(right, overlap, left.T @ step, basis)


def _far_step_(left: Tensor, right: Tensor, step: Tensor, basis: Tensor, coefficients: Tensor) -> None:
    """The step where left + step C is not nearly orthonormal, by Householder QR."""
    if bool(torch.isfinite(coefficients).all()):
        turned = orthonormalize(torch.addmm(left, step, coefficients))
    else:  # right and moved have nothing in common, as where the weight is zero: the iteration itself, not scaled
        moved = torch.addmm(right, left.T @ step, basis.T)
        turned = orthonormalize(torch.addmm(left @ (right @ moved.T), step, basis.T @ moved.T))
    _set_right_(right, turned.T @ left, turned.T @ step, basis)
    left.copy_(turned)


def _set_right_(right: Tensor, overlap: Tensor, moved: Tensor, basis: Tensor, columns: int = 512) -> None:
    """Right <- overlap right + moved basis.T, some columns at a time."""
    for part, directions in zip(right.split(columns, dim=1), basis.split(columns), strict=True):
        part.copy_(torch.addmm(overlap @ part, moved, directions.T))


def moved_gram(overlap: Tensor, shared: Tensor, step: Tensor, coefficients: Tensor) -> Tensor:
    """Gram matrix (K, K) of left + step C in float64, from that of left."""
    cross = coefficients.T.double() @ shared.double()
    inner = coefficients.T.double() @ (step.T @ step).double() @ coefficients.double()
    return inner.add_(overlap).add_(cross).add_(cross.T)


def step_coefficients(seen: Tensor, gram: Tensor, shared: Tensor, basis: Tensor) -> Tensor:
    """C = (basis.T moved.T) (right moved.T)^-1 (r, K): how far left turns to the step; not finite where it cannot.

    Args:
        seen: (K, r), right @ basis.
        gram: (K, K), right @ right.T.
        shared: (r, K), step.T @ left.
        basis: (I, r).
    """
    numerator = torch.addmm(seen.T, basis.T @ basis, shared)
    return _solve_right(numerator.double(), torch.addmm(gram, seen, shared).double()).to(seen.dtype)


def upper_factor(gram: Tensor) -> Tensor | None:
    """Upper triangular T with T.T T = gram (float64), in float64; None where columns are far from orthonormal."""
    factor, info = torch.linalg.cholesky_ex(gram)
    sizes = factor.diagonal()
    if int(info) or not bool(torch.isfinite(factor).all()) or not 1e-2 < float(sizes.min()) <= float(sizes.max()) < 1e2:
        return None
    return factor.T


def _solve_(matrix: Tensor, upper: Tensor, overlap: Tensor, rows: int = 512) -> Tensor:
    """Matrix <- matrix T^-1, some rows at a time; returns T^-T overlap."""
    unit = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    inverse = torch.linalg.solve_triangular(upper, unit, upper=True).to(matrix.dtype)
    for part in matrix.split(rows):
        part.copy_(part @ inverse)
    return inverse.T @ overlap


def _solve_right(numerator: Tensor, gram: Tensor) -> Tensor:
    """Numerator @ inverse(gram), regularised where that is singular to working precision; not finite where it is 0."""
    found, info = torch.linalg.solve_ex(gram, numerator, left=False)
    if not int(info) and bool(torch.isfinite(found).all()):
        return found
    scale = gram.diagonal().abs().max()
    ridge = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (scale * 1e-13)
    found, info = torch.linalg.solve_ex(gram + ridge, numerator, left=False)
    return torch.full_like(numerator, torch.nan) if int(info) else found
