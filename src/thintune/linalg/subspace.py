"""Warm-started subspace iteration and the exact step of a low-rank weight.

A weight W = left @ right meets an update of known right factor, W' = W + step @ basis.T, and is brought back to rank K
by one subspace iteration from the previous basis. Nothing of size O x I is formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thintune.linalg.orthonormal import orthonormalize


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
    """One subspace iteration on W + step @ basis.T, without forming it.

    With moved = right + (left.T step) basis.T, the coordinates of W' in the old basis, the iteration's column space is
    that of W' moved.T = left (right moved.T) + step (basis.T moved.T). Multiplying by the inverse of the K x K matrix
    right @ moved.T leaves the space as it is and makes the columns nearly orthonormal:

        left' = orth(left + step (basis.T moved.T) (right moved.T)^-1)
        right' = (left'.T left) right + (left'.T step) basis.T

    so that left' turns as little as it must and quantities stored in the old basis stay meaningful. Its products cost
    6 K r (O + I) + 2 K^2 (2 I + 3 O) FLOPs; beside the results, scratch is K max(O, I) and a few K^2 in float64.

    Args:
        left: (O, K), orthonormal columns.
        right: (K, I).
        step: (O, r), the update in coordinates of `basis`.
        basis: (I, r), orthonormal columns.

    Returns:
        The new left (O, K) with orthonormal columns and right (K, I).
    """
    if left.shape[0] == left.shape[1]:  # a square basis spans everything: only the coordinates move
        return left, torch.addmm(right, left.T @ step, basis.T)
    coefficients = step_coefficients(left, right, step, basis)
    if bool(torch.isfinite(coefficients).all()):
        turned = orthonormalize_near_(torch.addmm(left, step, coefficients))
    else:  # right and moved have nothing in common, as where the weight is zero: the iteration itself, not scaled
        moved = torch.addmm(right, left.T @ step, basis.T)
        turned = orthonormalize(torch.addmm(left @ (right @ moved.T), step, basis.T @ moved.T))
    return turned, ((turned.T @ left) @ right).addmm_(turned.T @ step, basis.T)


def step_coefficients(left: Tensor, right: Tensor, step: Tensor, basis: Tensor) -> Tensor:
    """(basis.T moved.T) (right moved.T)^-1 (r, K): how far left turns towards the step; not finite where it cannot."""
    moved = torch.addmm(right, left.T @ step, basis.T)
    return _solve_right((basis.T @ moved.T).double(), (right @ moved.T).double()).to(step.dtype)


def orthonormalize_near_(matrix: Tensor, chunk_rows: int = 512) -> Tensor:
    """Orthonormalises columns that are nearly orthonormal already, by Cholesky, else by Householder QR.

    Args:
        matrix: (n, k), contiguous; overwritten.
        chunk_rows: rows solved for at once, which bounds the scratch memory.

    Returns:
        (n, k) with orthonormal columns and unchanged signs: `matrix`, or a new tensor from the QR.
    """
    for _ in range(2):  # the second pass removes what rounding left of the first
        gram = (matrix.T @ matrix).double()
        factor, info = torch.linalg.cholesky_ex(gram)
        if int(info) or not bool(torch.isfinite(factor).all()) or float(factor.diagonal().min()) < 1e-2:
            return orthonormalize(matrix)
        upper = factor.T.to(matrix.dtype)
        for rows in matrix.split(chunk_rows):
            rows.copy_(torch.linalg.solve_triangular(upper, rows, upper=True, left=False))
    return matrix


def _solve_right(numerator: Tensor, gram: Tensor) -> Tensor:
    """Numerator @ inverse(gram), regularised where that is singular to working precision; not finite where it is 0."""
    found, info = torch.linalg.solve_ex(gram, numerator, left=False)
    if not int(info) and bool(torch.isfinite(found).all()):
        return found
    scale = gram.diagonal().abs().max()
    ridge = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (scale * 1e-13)
    found, info = torch.linalg.solve_ex(gram + ridge, numerator, left=False)
    return torch.full_like(numerator, torch.nan) if int(info) else found
