"""Random images of any size, for measuring without data; each is made when it is read and none is stored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thintune.config import DataConfig
from thintune.data.seeding import permutation
from thintune.data.source import Source

_TRAIN_KEY, _TEST_KEY = 1, 2


@dataclass(frozen=True)
class SyntheticImages:
    """Uniform noise; an image depends on its part's key and its official row alone."""

    key: int
    rows: Tensor
    """(n,) int64, official rows."""
    size: int

    def read(self, rows: Tensor) -> Tensor:
        """Makes the images of (B,) int64 rows, uint8 (B, S, S, 3)."""
        made = np.empty((len(rows), self.size, self.size, 3), np.uint8)
        for image, row in zip(made, self.rows[rows].tolist(), strict=True):
            image[:] = np.random.default_rng([self.key, row]).integers(0, 256, image.shape, np.uint8)
        return torch.from_numpy(made)


@dataclass(frozen=True)
class SyntheticPart:
    """An official part of random images."""

    key: int
    labels: Tensor
    size: int

    def select(self, *groups: Tensor) -> tuple[SyntheticImages, ...]:
        """Keeps the row numbers."""
        return tuple(SyntheticImages(self.key, group, self.size) for group in groups)


def load_synthetic(config: DataConfig) -> Source:
    """Random images with random labels; every class is as frequent as the next, to within one image."""

    def part(key: int, images: int) -> SyntheticPart:
        return SyntheticPart(key, permutation(images, key) % config.synthetic_classes, config.image_size)

    test_images = max(64, config.synthetic_images // 4)
    train, test = part(_TRAIN_KEY, config.synthetic_images), part(_TEST_KEY, test_images)
    return Source("synthetic", train, test, classes=config.synthetic_classes)
