"""Sources whose images are files: decoded when they are asked for, never kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from thintune.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

_WIDE_MODES = ("I", "F")


@dataclass(frozen=True)
class FileImages:
    """Image files that become uint8 (B, S, S, 3)."""

    paths: tuple[str, ...]
    size: int

    def read(self, rows: Tensor) -> Tensor:
        """Decodes the images of (B,) int64 rows."""
        decoded = np.empty((len(rows), self.size, self.size, 3), np.uint8)
        for image, row in zip(decoded, rows.tolist(), strict=True):
            image[:] = decode(self.paths[row], self.size)
        return torch.from_numpy(decoded)


@dataclass(frozen=True)
class FilePart:
    """An official part whose images are files."""

    labels: Tensor
    """(n,) int64."""
    paths: list[str]
    size: int

    def select(self, *groups: Tensor) -> tuple[FileImages, ...]:
        """Keeps the paths of each group of rows."""
        return tuple(FileImages(tuple(self.paths[row] for row in group.tolist()), self.size) for group in groups)


def decode(path: str, size: int) -> np.ndarray:
    """Decodes the centred square of an image file, resized (bicubic, antialiased) so that its sides are S.

    Returns:
        (S, S, 3) uint8.

    Raises:
        DataError: a file that is missing, damaged or of an unknown format.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            # A large JPEG is decoded at a half, a quarter or an eighth, still twice S or more: a fraction of the bytes.
            image.draft(None, (2 * size, 2 * size))
            return np.asarray(_centred_square(_to_rgb(image), size))
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image, though the data set lists it; restore the file.") from error
    except Exception as error:  # decoders raise anything on damaged input
        raise DataError(f"{path}: cannot be read as an image ({error}); replace or delete the file.") from error


def _centred_square(image: Image.Image, size: int) -> Image.Image:
    """Resizes the shorter side to S and crops the centre, in one step."""
    from PIL.Image import Resampling

    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Resampling.BICUBIC, box=(left, top, left + side, top + side))


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I;16"):  # convert("RGB") would clip, and turn most of the image white
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in _WIDE_MODES:
        raise ValueError(f"expected 8 or 16 bits a channel, got pixel mode {image.mode}")
    if image.mode == "P" and "transparency" in image.info:  # Pillow warns unless it goes through RGBA
        return image.convert("RGBA").convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy it whole
