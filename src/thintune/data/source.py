"""What every source hands over: its official parts, with all labels but no image read yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from thintune.data.images import Pixels
from thintune.errors import DataError


class Part(Protocol):
    """The official training or test images."""

    @property
    def labels(self) -> Tensor:
        """(n,) int64."""
        ...

    def select(self, *groups: Tensor) -> Sequence[Pixels]:
        """Keeps the images of some rows, one `Pixels` for each (any number,) int64 group."""
        ...


@dataclass(frozen=True)
class Source:
    """A data set before it is cut into splits."""

    where: str
    """Name or folder, for messages."""
    train: Part
    test: Part
    classes: int

    def __post_init__(self) -> None:
        for name, part in (("training", self.train), ("test", self.test)):
            if not len(part.labels):
                raise DataError(f"{self.where}: expected {name} images, got none.")
            low, high = int(part.labels.min()), int(part.labels.max())
            if low < 0 or high >= self.classes:
                raise DataError(
                    f"{self.where}: expected {name} labels from 0 to {self.classes - 1}, got {low}..{high}; "
                    "the label file is damaged or belongs to another data set."
                )


def check_folder(root: Path, advice: str) -> None:
    """Raises DataError, ending in what to do, unless `root` is a folder."""
    if not root.exists():
        raise DataError(f"{root}: no such folder; {advice}.")
    if not root.is_dir():
        raise DataError(f"{root}: expected a folder, got a file; {advice}.")
