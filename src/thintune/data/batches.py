"""Batches as row numbers: an epoch's order is computed from its seed and number, so resuming needs no state."""

from __future__ import annotations

from torch import Tensor

from thintune.data.seeding import permutation


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """Cuts a seeded permutation of the n rows into batches.

    Args:
        n: images of the split.
        batch_size: rows of a batch, at least 1.
        seed: seed of the run.
        epoch: number of the epoch; each has its own order.

    Returns:
        Row numbers, each batch (batch_size,) int64; the last one may be shorter. Every row occurs once.

    Example:
        >>> [len(batch) for batch in epoch_batches(10, 4, seed=0, epoch=0)]
        [4, 4, 2]
    """
    return list(permutation(n, seed, epoch).split(batch_size)) if n else []


def micro_batches(batch: Tensor, micro_batch: int | None) -> list[Tensor]:
    """Cuts a batch's rows, in their order, into pieces of at most `micro_batch`; None keeps the batch whole."""
    if not len(batch):
        return []
    return [batch] if micro_batch is None else list(batch.split(micro_batch))
