"""Leading directions of a matrix that is only ever seen through a few products."""

from __future__ import annotations

import torch
from torch import Tensor


def leading_directions(start: Tensor, image: Tensor, rank: int) -> Tensor:
    """Leading eigenvectors of a positive semi-definite matrix A, from one product A @ start (Nystrom's approximation).

    A is replaced by image (start.T image)^-1 image.T, which loses less the wider `start` is than `rank`. A shift
    proportional to the rounding of `image` keeps the inverse stable (arXiv 1706.05736, algorithm 3).

    Args:
        start: (n, m), orthonormal columns.
        image: (n, m), A @ start.
        rank: r, at most m.

    Returns:
        (n, r), orthonormal columns, dtype of `start`.
    """
    wide = start.double()
    shift = torch.finfo(image.dtype).eps * float(image.double().norm())
    if not shift:
        return start[:, :rank].contiguous()  # A is zero: any directions will do
    moved = torch.add(image.double(), wide, alpha=shift)
    core = wide.T @ moved
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    root = vectors / values.clamp_min(shift / 2).sqrt()
    found, _, _ = torch.linalg.svd(moved @ root, full_matrices=False)
    return found[:, :rank].to(start.dtype).contiguous()
