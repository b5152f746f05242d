"""Truncated singular value decomposition and ranks by explained variance."""

from __future__ import annotations

import torch
from torch import Tensor

from thintune.errors import ConfigError


def rank_for_explained_variance(variances: Tensor, explained_variance: float) -> int:
    """Smallest rank whose leading variances sum to the asked share (arXiv 2510.09160, eq. for WSI's rank).

    Args:
        variances: (n,) non-negative, descending (squared singular values, or eigenvalues).
        explained_variance: the share, in (0, 1].

    Returns:
        A rank from 1 to n.

    Raises:
        ConfigError: a share outside (0, 1].
    """
    if not 0 < explained_variance <= 1:
        raise ConfigError(f"explained_variance: expected a number in (0, 1], got {explained_variance}.")
    cumulative = variances.double().clamp_min(0).cumsum(0)
    total = cumulative[-1]
    if total <= 0:
        return 1
    if explained_variance == 1:
        return max(1, int((variances > 0).sum()))
    reached = cumulative >= explained_variance * total * (1 - 1e-12)
    return int(reached.int().argmax()) + 1


def truncated_svd(
    weight: Tensor, *, rank: int | None = None, explained_variance: float | None = None
) -> tuple[Tensor, Tensor]:
    """Best approximation of a weight by two thin factors (WSI's start, arXiv 2510.09160).

    Args:
        weight: (O, I).
        rank: number of directions to keep, at most min(O, I); or
        explained_variance: share of the squared singular values to keep, in (0, 1].

    Returns:
        left (O, K) with orthonormal columns, and right (K, I), so that `left @ right` is the rank-K truncation.

    Raises:
        ConfigError: neither or both of rank and share given, or a rank out of range.
    """
    if (rank is None) == (explained_variance is None):
        raise ConfigError("truncated_svd: expected one of rank and explained_variance.")
    limit = min(weight.shape)
    if rank is not None and not 1 <= rank <= limit:
        raise ConfigError(f"rank {rank} is not from 1 to min(out_features, in_features) = {limit}.")
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    if rank is None:
        assert explained_variance is not None
        rank = rank_for_explained_variance(s.square(), explained_variance)
    return u[:, :rank].contiguous(), (s[:rank, None] * vh[:rank]).contiguous()
