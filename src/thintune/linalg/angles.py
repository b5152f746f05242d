"""Angles between subspaces."""

from __future__ import annotations

import torch
from torch import Tensor


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles between the spans of two orthonormal bases, smallest first (Björck and Golub, 1973).

    Cosines are the singular values of a.T b, sines those of b - a (a.T b); each angle is taken from whichever of the
    two is the smaller, since neither tells angles near its own maximum apart.

    Args:
        a: (n, p), orthonormal columns.
        b: (n, q), orthonormal columns, q <= p.

    Returns:
        (q,) radians in [0, pi/2], float64.
    """
    a, b = a.double(), b.double()
    cross = a.T @ b
    cosines = torch.linalg.svdvals(cross).clamp(max=1)
    sines = torch.linalg.svdvals(b - a @ cross).clamp(max=1).flip(0)
    return torch.where(cosines**2 > 0.5, sines[: len(cosines)].asin(), cosines.acos())
