"""Orthonormal bases of column spaces."""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormalize(matrix: Tensor) -> Tensor:
    """Returns orthonormal columns that span those of `matrix`, without flipping their signs.

    The QR decomposition leaves each column's sign free; fixing the diagonal of the triangular factor to be positive
    makes the result continuous: the basis of a slightly moved matrix is a slightly moved basis, which moments and
    warm starts rely on.

    Args:
        matrix: (n, k) with k <= n; float32 or float64.

    Returns:
        (n, k), same dtype. Columns beyond the numerical rank are completed to an orthonormal set.

    Raises:
        ValueError: more columns than rows.
    """
    rows, columns = matrix.shape
    if columns > rows:
        raise ValueError(f"orthonormalize: expected at most as many columns as rows, got {rows} x {columns}.")
    q, r = torch.linalg.qr(matrix)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    return q.mul_(signs)
