"""From stored bytes to the floats of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from thintune.errors import ConfigError


@dataclass(frozen=True)
class Normalization:
    """Mean and deviation that a model expects, on images in [0, 1]."""

    mean: tuple[float, ...]
    """Per channel: three numbers, or one for all."""
    std: tuple[float, ...]
    """Per channel, as many as `mean`, each more than 0."""

    def __post_init__(self) -> None:
        if len(self.mean) not in (1, 3) or len(self.mean) != len(self.std):
            raise ConfigError(
                f"normalization: expected 1 or 3 means and as many deviations, got {self.mean} and {self.std}."
            )
        if min(self.std) <= 0:
            raise ConfigError(f"normalization.std: expected numbers above 0, got {self.std}.")


class Pixels(Protocol):
    """The images of one split, in the leanest form that their source allows."""

    def read(self, rows: Tensor) -> Tensor:
        """Returns the images of (B,) int64 rows, uint8 (B, H, W) or (B, H, W, C) with C one or three."""
        ...


class Split:
    """One split: labels, and images that become floats only when asked for."""

    labels: Tensor
    """(n,) int64, from 0."""

    def __init__(self, pixels: Pixels, labels: Tensor, image_size: int, normalization: Normalization) -> None:
        self.labels = labels
        self._pixels = pixels
        self._image_size = image_size
        # On the scale of the stored bytes, which saves a pass over each batch.
        self._mean = 255 * torch.tensor(normalization.mean).view(-1, 1, 1)
        self._std = 255 * torch.tensor(normalization.std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Reads, resizes and normalises the images of some rows.

        Args:
            indices: (B,) whole numbers from 0 to n - 1, in any order.

        Returns:
            (B, 3, S, S) float32; grey images have three equal channels before normalisation.

        Raises:
            IndexError: a row outside the split, or indices that are not whole numbers.
            DataError: a file that cannot be read as an image.
        """
        rows = self._rows(indices)
        if not len(rows):
            return torch.empty(0, 3, self._image_size, self._image_size)
        images = _to_float(self._pixels.read(rows), self._image_size)
        return images.sub_(self._mean).div_(self._std)

    def _rows(self, indices: Sequence[int] | Tensor) -> Tensor:
        rows = torch.as_tensor(indices)
        if not rows.numel():
            return torch.empty(0, dtype=torch.int64)
        # A mask would silently be read as rows 0 and 1.
        if rows.ndim != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
            raise IndexError(f"images: expected a list of row numbers, got {rows.dtype} of shape {tuple(rows.shape)}.")
        if rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(
                f"images: expected rows from 0 to {len(self) - 1}, got {int(rows.min())}..{int(rows.max())}."
            )
        return rows.to("cpu", torch.int64)


def _to_float(pixels: Tensor, size: int) -> Tensor:
    """Turns uint8 (B, H, W) or (B, H, W, C) into float32 (B, 3, S, S), still from 0 to 255, in memory of its own."""
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    height, width = images.shape[-2:]
    if (height, width) != (size, size):
        shrinks = size < max(height, width)
        images = interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=shrinks)
    return images.expand(-1, 3, -1, -1).contiguous()
