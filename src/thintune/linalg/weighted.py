"""Factors of a weight in the norm of what its outputs are worth.

With G = E[g g.T] the second moment of the gradient of some loss with respect to the layer's output, an error e of the
output changes the loss, to second order and in the Kronecker-factored form of the Fisher matrix (K-FAC, arXiv
1503.05671), by e.T G e / 2. The factors that lose least of it are the truncated SVD of H W C^1/2 with H = G^1/2, taken
back by H^-1 (FWSVD, arXiv 2207.00112, with both norms). Here G is diagonal: one worth for each output feature.

The squared singular values that are cut off are then losses in one unit, whichever layer they belong to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thintune.linalg.factors import data_aware_factors, output_spectrum
from thintune.linalg.orthonormal import orthonormalize

_FLOOR = 0.01
"""Least worth of an output feature, as a share of the mean worth: a few images tell too little to give one up."""


def worth_root(worth: Tensor) -> Tensor:
    """H, the root of what each output feature is worth, floored.

    Args:
        worth: (O,), mean or sum of g^2, >= 0.

    Returns:
        (O,), float64; zeros where nothing is worth anything.
    """
    wide = worth.double()
    return wide.clamp_min(_FLOOR * float(wide.mean())).sqrt()


def weighted_spectrum(weight: Tensor, covariance: Tensor, root: Tensor, ridge: float = 0.0) -> Tensor:
    """What is lost with each principal direction of the weighted output, H W (C + ridge I) W.T H.

    Args:
        weight: (O, I).
        covariance: (I, I), centred covariance of the layer's input.
        root: (O,), H.
        ridge: added to the diagonal of the covariance.

    Returns:
        (min(O, I),) float64, descending; its sum from K on is the loss of rank K.
    """
    return output_spectrum(_scaled(weight, root), covariance, ridge)


def weighted_factors(
    weight: Tensor, covariance: Tensor, mean: Tensor, rank: int, root: Tensor, ridge: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Rank-K factors that lose least of the weighted output in mean square.

    Args:
        weight: (O, I).
        covariance: (I, I), centred covariance of the layer's input.
        mean: (I,), mean of the layer's input.
        rank: K, from 1 to min(O, I).
        root: (O,), H; zeros count as ones.
        ridge: added to the diagonal of the covariance.

    Returns:
        left (O, K) with orthonormal columns, right (K, I), and shift (O,), to be added to the bias so that the mean
        output stays that of the dense layer. dtype of `weight`.
    """
    root = root / root.mean() if bool((root > 0).all()) else torch.ones_like(root)
    inner, right, _ = data_aware_factors(_scaled(weight, root), covariance, mean, rank, ridge)
    outer = inner.double().div_(root.unsqueeze(1))
    left = orthonormalize(outer)
    right = ((left.T @ outer) @ right.double()).to(weight.dtype)
    left = left.to(weight.dtype)
    centre = mean.to(weight.dtype)
    return left, right, weight @ centre - left @ (right @ centre)


def _scaled(weight: Tensor, root: Tensor) -> Tensor:
    return weight * root.to(weight.dtype).unsqueeze(1)
