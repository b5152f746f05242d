"""Seeded orders: every draw depends on its key alone, so that it can be repeated at any time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

HELD_OUT_KEY = 1797
"""Key of the test cut of sources without an official one; constant, so that no setting moves the test images."""
HELD_OUT_SHARE = 0.2


def permutation(n: int, *key: int) -> Tensor:
    """Returns the numbers from 0 to n - 1, (n,) int64, in an order that depends only on n and the key."""
    # SeedSequence mixes the parts of the key: (0, 1) and (1, 0) differ, as a sum of seeds would not. Each part is two
    # words, or (2**32,) would run into (0, 1).
    words = [word for part in key for word in divmod(part % 2**64, 2**32)]
    seed = int(np.random.SeedSequence(words).generate_state(1)[0])
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def held_out(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cuts a fixed test split, class by class.

    Args:
        labels: (n,) int64.

    Returns:
        Rows for training and rows for testing, each ascending int64. A fifth of each class is for testing; at least one
        image of a class of two or more.
    """
    train, test = [], []
    for label in labels.unique().tolist():
        rows = torch.nonzero(labels == label)[:, 0]
        count = max(1, round(HELD_OUT_SHARE * len(rows))) if len(rows) > 1 else 0
        rows = rows[permutation(len(rows), HELD_OUT_KEY, label)]
        test.append(rows[:count])
        train.append(rows[count:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values
