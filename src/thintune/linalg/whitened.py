"""Truncation-aware data whitening (SVD-LLM, arXiv 2403.07378): the SVD of a weight in the norm of its inputs.

With S S.T = X.T X, the loss of the layer's output over the rows X is that of W S: |X W.T - X W~.T| = |(W - W~) S|. So
truncating the SVD of W S, U_K Sigma_K V_K.T S^-1, loses exactly the discarded singular values, and no map of rank K
loses less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thintune.errors import ConversionError
from thintune.linalg.svd import truncated_svd

_RIDGE = 1e-6
"""Added to the diagonal, as a share of its mean: directions that no input takes would make S singular."""


def whitening(second_moment: Tensor) -> Tensor:
    """Cholesky factor S (I, I) of E[x x.T] plus a small ridge, lower triangular, float64.

    Args:
        second_moment: (I, I), not centred. Zeros tell nothing of the inputs: S is then the identity.

    Raises:
        ConversionError: moments that are not finite.
    """
    matrix = second_moment.double()
    mean = float(matrix.diagonal().mean())
    if mean <= 0:
        return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    identity = torch.eye(len(matrix)).to(matrix)
    for ridge in (_RIDGE * 10**n for n in range(7)):  # rounding in float32 may leave eigenvalues below zero
        factor, failed = torch.linalg.cholesky_ex(matrix + ridge * mean * identity)
        if not int(failed):
            return factor
    raise ConversionError("the second moment of a layer's calibration inputs is not finite.")


def whitened_factors(
    weight: Tensor, second_moment: Tensor, *, rank: int | None = None, explained_variance: float | None = None
) -> tuple[Tensor, Tensor]:
    """Factors of the truncated SVD of W S, with S taken out again.

    Args:
        weight: (O, I).
        second_moment: (I, I), E[x x.T] of the layer's input.
        rank: K, at most min(O, I); or
        explained_variance: share of the squared singular values of W S to keep, in (0, 1].

    Returns:
        left (O, K) = U_K, orthonormal columns, and right (K, I) = Sigma_K V_K.T S^-1 = U_K.T W, which takes no inverse.

    Raises:
        ConfigError: neither or both of rank and share given, or a rank out of range.
    """
    scaled = weight.double() @ whitening(second_moment)
    left, _ = truncated_svd(scaled, rank=rank, explained_variance=explained_variance)
    left = left.to(weight.dtype).contiguous()
    return left, left.T @ weight
