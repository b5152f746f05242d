"""Sources whose images are small arrays: the selected ones are held as one uint8 tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thintune.config import DataConfig
from thintune.data.optional import require
from thintune.data.seeding import held_out
from thintune.data.source import Source

BLOCK_IMAGES = 1024
"""Images that are looked at together while rows are gathered."""


@dataclass(frozen=True)
class StoredImages:
    """Images in memory, uint8 (n, H, W) or (n, H, W, C)."""

    values: Tensor

    def read(self, rows: Tensor) -> Tensor:
        """Returns the images of (B,) int64 rows."""
        return self.values[rows]


@dataclass(frozen=True)
class ArrayPart:
    """An official part that can be read from the start, block by block."""

    labels: Tensor
    """(n,) int64."""
    shape: tuple[int, ...]
    """Of one image."""
    blocks: Callable[[], Iterable[np.ndarray]]
    """Starts a pass over all n images, as uint8 arrays (any number, *shape)."""

    def select(self, *groups: Tensor) -> tuple[StoredImages, ...]:
        """Keeps the images of each group of rows; one pass, one tensor, of which each group is a view."""
        values = torch.from_numpy(gather(self.blocks(), torch.cat(groups).numpy(), self.shape))
        return tuple(StoredImages(part) for part in values.split([len(group) for group in groups]))


def gather(blocks: Iterable[np.ndarray], rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Picks rows out of a stream, without ever holding more than one block of it.

    Args:
        blocks: uint8 arrays (any number, *shape), in order; read to the end.
        rows: (n,) int64, in any order.
        shape: shape of one image.

    Returns:
        (n, *shape) uint8, in the order of `rows`.
    """
    kept = np.empty((len(rows), *shape), np.uint8)
    start = 0
    for block in blocks:
        places = np.flatnonzero((rows >= start) & (rows < start + len(block)))
        kept[places] = block[rows[places] - start]
        start += len(block)
    return kept


def in_blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    """Cuts an array into views, so that gathering from it never copies more than a block."""
    for start in range(0, len(values), BLOCK_IMAGES):
        yield values[start : start + BLOCK_IMAGES]


def load_digits(config: DataConfig) -> Source:
    """The 1797 grey 8 × 8 digits that come with scikit-learn; a fifth of each class is the test split."""
    bunch = require("sklearn.datasets", "data.name=digits").load_digits()
    values = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    labels = torch.from_numpy(bunch.target.astype(np.int64))

    def part(rows: Tensor) -> ArrayPart:
        return ArrayPart(labels[rows], (8, 8), lambda: in_blocks(values[rows.numpy()]))

    train, test = held_out(labels)
    return Source("digits", part(train), part(test), classes=10)
