"""Tucker forms of activations: x ~ core x_1 U_1 x_2 U_2 ... x_n U_n, for tensors of any order >= 2.

The factors are found one mode at a time on the already shrunken tensor (ST-HOSVD), either by eigenvectors of the
mode's Gram matrix or, warm, by one subspace iteration from the previous factors (ASI, arXiv 2505.05086).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thintune.linalg.orthonormal import orthonormalize
from thintune.linalg.svd import rank_for_explained_variance


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Matrix (n_mode, product of the others) whose rows run along one mode; a view where the layout allows.

    The columns follow the order of the remaining axes.
    """
    return tensor.movedim(mode, 0).flatten(1)


def mode_dot(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Multiplies one mode by a matrix: axis of size n becomes m for a matrix (m, n).

    The last mode is one plain product, the first one product of a view; a middle mode is a batched product. None of
    them copies the tensor.
    """
    mode %= tensor.ndim
    if mode == tensor.ndim - 1:
        return tensor @ matrix.T
    size = tensor.shape[mode]
    grouped = tensor.reshape(tensor.shape[:mode].numel(), size, -1)
    product = matrix @ grouped[0] if len(grouped) == 1 else matrix @ grouped
    return product.reshape(*tensor.shape[:mode], len(matrix), *tensor.shape[mode + 1 :])


def _gram(tensor: Tensor, mode: int) -> Tensor:
    """(n, n) Gram matrix of a mode's unfolding, in float64."""
    if mode == tensor.ndim - 1:
        rows = tensor.reshape(-1, tensor.shape[-1])
        return (rows.T @ rows).double()
    grouped = tensor.reshape(tensor.shape[:mode].numel(), tensor.shape[mode], -1)
    return torch.einsum("anb,amb->nm", grouped, grouped).double()


def mode_ranks(tensor: Tensor, explained_variance: float) -> tuple[int, ...]:
    """Ranks by explained variance of every mode (HOSVD spectra), one per mode.

    Raises:
        ConfigError: a share outside (0, 1].
    """
    ranks = []
    for mode in range(tensor.ndim):
        spectrum = torch.linalg.eigvalsh(_gram(tensor, mode)).flip(0)
        ranks.append(rank_for_explained_variance(spectrum, explained_variance))
    return tuple(ranks)


def clip_ranks(shape: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Ranks no larger than a mode's size, nor than what the already shrunken others can carry."""
    sizes = list(shape)
    for mode, rank in enumerate(ranks):
        others = 1
        for other, size in enumerate(sizes):
            others *= size if other != mode else 1
        sizes[mode] = max(1, min(rank, sizes[mode], others))
    return tuple(sizes)


def st_hosvd(tensor: Tensor, ranks: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Sequentially truncated higher-order SVD.

    Args:
        tensor: (n_1, ..., n_m), m >= 2.
        ranks: one per mode; clipped to what is possible.

    Returns:
        core (r_1, ..., r_m) and factors (n_i, r_i) with orthonormal columns.
    """
    core, factors = tensor, []
    for mode, rank in enumerate(clip_ranks(tensor.shape, ranks)):
        _, vectors = torch.linalg.eigh(_gram(core, mode))
        factor = vectors.flip(1)[:, :rank].to(tensor.dtype).contiguous()
        core = mode_dot(core, factor.T, mode)
        factors.append(factor)
    return core, factors


def hosvd(tensor: Tensor, explained_variance: float) -> tuple[Tensor, list[Tensor]]:
    """Truncated higher-order SVD, its ranks by explained variance (AMC, arXiv 2411.06346).

    Every factor holds the leading left singular vectors of the tensor's own unfolding, found as eigenvectors of its
    Gram matrix in the tensor's precision, which is what takes the time; the core is the projection on all of them.

    Args:
        tensor: (n_1, ..., n_m), m >= 2.
        explained_variance: share of the variance that every mode must keep, in (0, 1].

    Returns:
        core (r_1, ..., r_m) and factors (n_i, r_i) with orthonormal columns, the ranks those of `mode_ranks`.

    Raises:
        ConfigError: a share outside (0, 1].
    """
    core, factors = tensor, []
    for mode in range(tensor.ndim):
        gram = _gram(tensor, mode).to(torch.promote_types(tensor.dtype, torch.float32))
        values, vectors = torch.linalg.eigh(gram)
        rank = rank_for_explained_variance(values.flip(0), explained_variance)
        factor = vectors.flip(1)[:, :rank].to(tensor.dtype).contiguous()
        core = mode_dot(core, factor.T, mode)
        factors.append(factor)
    return core, factors


def sketch(rows: int, columns: int, like: Tensor) -> Tensor:
    """Fixed Gaussian matrix (rows, columns), the start of an iteration that has no past; the same on every call."""
    generator = torch.Generator().manual_seed(0x7417 + rows * 65537 + columns)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(like)


def compress_warm(tensor: Tensor, ranks: Sequence[int], start: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
    """Tucker form by one subspace iteration a mode, from warm factors (ASI, arXiv 2505.05086, alg. 1).

    A factor is used as a start only where its shape fits; `None`, or one of another batch or image size, starts from
    a fixed sketch instead (a randomised range finder).

    Args:
        tensor: (n_1, ..., n_m), m >= 2.
        ranks: one per mode; clipped to what is possible.
        start: previous factor (n_i, r_i) of each mode, or None.

    Returns:
        core (r_1, ..., r_m) and factors (n_i, r_i) with orthonormal columns.
    """
    core, factors = tensor, []
    for mode, rank in enumerate(clip_ranks(tensor.shape, ranks)):
        size = core.shape[mode]
        warm = start[mode]
        if warm is None or warm.shape != (size, rank):
            warm = sketch(size, rank, tensor)
        if mode == core.ndim - 1:
            rows = core.reshape(-1, size)
            moved = rows.T @ (rows @ warm)
        else:
            grouped = core.reshape(core.shape[:mode].numel(), size, -1)
            moved = (grouped @ (warm.T @ grouped).mT).sum(0)
        factor = orthonormalize(moved)
        core = mode_dot(core, factor.T, mode)
        factors.append(factor)
    return core, factors


def reconstruct(core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Multiplies a Tucker form out: (r_1, ..., r_m) and (n_i, r_i) to (n_1, ..., n_m)."""
    for mode, factor in enumerate(factors):
        core = mode_dot(core, factor, mode)
    return core
