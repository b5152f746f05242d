"""Data-aware factors of a weight: principal components of the layer's output instead of the weight's own.

With C the covariance of a layer's input, the rank-K map that loses least of the layer's output in mean square is
left @ left.T @ W, with left the leading eigenvectors of W C W.T. Centring C and returning the lost mean through the
bias costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _square_root(covariance: Tensor) -> Tensor:
    """Symmetric square root (I, I) of a positive semi-definite matrix, in float64."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _output_components(weight: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,) and eigenvectors (O, n) of W C W.T, descending, n = min(O, I), in float64.

    Works on the smaller side: O x O when O <= I, else I x I through a square root of C.
    """
    wide = weight.double()
    if weight.shape[0] <= weight.shape[1]:
        values, vectors = torch.linalg.eigh(wide @ covariance.double() @ wide.T)
        return values.flip(0).clamp_min(0), vectors.flip(1)
    root = wide @ _square_root(covariance)
    values, vectors = torch.linalg.eigh(root.T @ root)
    values = values.flip(0).clamp_min(0)
    images = root @ vectors.flip(1)
    # directions of zero variance have no image; a QR completes them to an orthonormal set
    q, r = torch.linalg.qr(images)
    return values, q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def output_spectrum(weight: Tensor, covariance: Tensor) -> Tensor:
    """Variances of the layer's output along its principal directions.

    Args:
        weight: (O, I).
        covariance: (I, I), centred covariance of the layer's input.

    Returns:
        (min(O, I),) float64, descending.
    """
    return _output_components(weight, covariance)[0]


def data_aware_factors(weight: Tensor, covariance: Tensor, mean: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rank-K factors that lose least of the layer's output in mean square.

    Args:
        weight: (O, I).
        covariance: (I, I), centred covariance of the layer's input.
        mean: (I,), mean of the layer's input.
        rank: K, from 1 to min(O, I).

    Returns:
        left (O, K) with orthonormal columns, right (K, I), and shift (O,), to be added to the bias so that the mean
        output stays that of the dense layer. dtype of `weight`.
    """
    _, vectors = _output_components(weight, covariance)
    left = vectors[:, :rank].to(weight.dtype).contiguous()
    right = left.T @ weight
    centre = mean.to(weight.dtype)
    shift = weight @ centre - left @ (right @ centre)
    return left, right, shift


def input_basis(second_moment: Tensor, rank: int) -> Tensor:
    """Directions that hold most of an input's second moment: the feature mode of its Tucker form.

    Args:
        second_moment: (I, I), E[x x.T], not centred, since the weight gradient sees the mean too.
        rank: r, from 1 to I.

    Returns:
        (I, r), orthonormal columns, float32 unless the input is float64.
    """
    _, vectors = torch.linalg.eigh(second_moment.double())
    dtype = torch.float64 if second_moment.dtype == torch.float64 else torch.float32
    return vectors.flip(1)[:, :rank].to(dtype).contiguous()
