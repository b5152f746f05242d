"""Data-aware factors of a weight: principal components of the layer's output instead of the weight's own.

With C the covariance of a layer's input, the rank-K map that loses least of the layer's output in mean square is
left @ left.T @ W, with left the leading eigenvectors of W C W.T. Centring C and returning the lost mean through the
bias costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from thintune.linalg.orthonormal import orthonormalize
from thintune.linalg.sketch import leading_directions

_PIECE = 512
"""Rows or columns widened to float64 at a time, so that no wide copy of a whole matrix is held."""
_EXACT_FEATURES = 1024
"""Largest I x I matrix whose eigenvectors are found by a full decomposition."""


def _pieces(size: int) -> Iterator[slice]:
    return (slice(start, start + _PIECE) for start in range(0, size, _PIECE))


def _output_covariance(weight: Tensor, covariance: Tensor, ridge: float) -> Tensor:
    """W (C + ridge I) W.T, (O, O) float64, piece by piece."""
    total = weight.new_zeros(weight.shape[0], weight.shape[0], dtype=torch.float64)
    for columns in _pieces(weight.shape[1]):
        wide = weight[:, columns].double()
        image = ridge * wide
        for rows in _pieces(weight.shape[1]):
            image.addmm_(weight[:, rows].double(), covariance[rows, columns].double())
        total.addmm_(image, wide.T)
    return total


def _square_root(covariance: Tensor, ridge: float) -> Tensor:
    """Symmetric square root (I, I) of C + ridge I, C positive semi-definite, in float64."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return (vectors * values.add_(ridge).clamp_min_(0).sqrt()) @ vectors.T


def _input_side(weight: Tensor, root: Tensor) -> Tensor:
    """S W.T W S, (I, I) float64: the same spectrum as W C W.T where C = S S."""
    gram = torch.zeros_like(root)
    for rows in _pieces(weight.shape[0]):
        wide = weight[rows].double()
        gram.addmm_(wide.T, wide)
    return root @ gram @ root


def output_spectrum(weight: Tensor, covariance: Tensor, ridge: float = 0.0) -> Tensor:
    """Variances of the layer's output along its principal directions.

    Works on the smaller side: O x O when O <= I, else I x I through a square root of C.

    Args:
        weight: (O, I).
        covariance: (I, I), centred covariance of the layer's input.
        ridge: added to the diagonal of the covariance.

    Returns:
        (min(O, I),) float64, descending.
    """
    if weight.shape[0] <= weight.shape[1]:
        smaller = _output_covariance(weight, covariance, ridge)
    else:
        smaller = _input_side(weight, _square_root(covariance, ridge))
    return torch.linalg.eigvalsh(smaller).flip(0).clamp_min(0)


def _output_directions(weight: Tensor, covariance: Tensor, rank: int, ridge: float) -> Tensor:
    """Leading eigenvectors (O, K) of W (C + ridge I) W.T, in float64."""
    if weight.shape[0] <= weight.shape[1]:
        _, vectors = torch.linalg.eigh(_output_covariance(weight, covariance, ridge))
        return vectors.flip(1)[:, :rank]
    root = _square_root(covariance, ridge)
    _, vectors = torch.linalg.eigh(_input_side(weight, root))
    leading = root @ vectors.flip(1)[:, :rank]
    images = torch.cat([weight[rows].double() @ leading for rows in _pieces(weight.shape[0])])
    return orthonormalize(images)  # completes directions of zero variance, which have no image


def data_aware_factors(
    weight: Tensor, covariance: Tensor, mean: Tensor, rank: int, ridge: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Rank-K factors that lose least of the layer's output in mean square.

    Args:
        weight: (O, I).
        covariance: (I, I), centred covariance of the layer's input.
        mean: (I,), mean of the layer's input.
        rank: K, from 1 to min(O, I).
        ridge: added to the diagonal of the covariance.

    Returns:
        left (O, K) with orthonormal columns, right (K, I), and shift (O,), to be added to the bias so that the mean
        output stays that of the dense layer. dtype of `weight`.
    """
    left = _output_directions(weight, covariance, rank, ridge).to(weight.dtype).contiguous()
    right = left.T @ weight
    centre = mean.to(weight.dtype)
    shift = weight @ centre - left @ (right @ centre)
    return left, right, shift


def input_basis(second_moment: Tensor, rank: int) -> Tensor:
    """Directions that hold most of an input's second moment: the feature mode of its Tucker form.

    A full decomposition up to 1024 features; beyond, where its workspace would be the largest of a conversion, four
    subspace iterations from a fixed random start.

    Args:
        second_moment: (I, I), E[x x.T], not centred, since the weight gradient sees the mean too.
        rank: r, from 1 to I.

    Returns:
        (I, r), orthonormal columns, float32 unless the input is float64.
    """
    features = len(second_moment)
    dtype = torch.float64 if second_moment.dtype == torch.float64 else torch.float32
    if features <= _EXACT_FEATURES:
        _, vectors = torch.linalg.eigh(second_moment.double())
        return vectors.flip(1)[:, :rank].to(dtype).contiguous()
    matrix = second_moment.to(dtype)
    width = min(features, 2 * rank + 8)
    start = torch.randn(features, width, generator=torch.Generator().manual_seed(0), dtype=dtype)
    basis = orthonormalize(start.to(matrix.device))
    for _ in range(3):
        basis = orthonormalize(matrix @ basis)
    return leading_directions(basis, matrix @ basis, rank)
