"""From a source's official parts to training, validation and test splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from thintune.config import DataConfig
from thintune.data.arrays import load_digits
from thintune.data.folder import load_folder
from thintune.data.idx import load_fashion_mnist
from thintune.data.images import Normalization, Split
from thintune.data.seeding import permutation
from thintune.data.source import Source
from thintune.data.synthetic import load_synthetic
from thintune.data.torchvision_sources import load_cifar, load_files
from thintune.errors import DataError

LOADERS: dict[str, Callable[[DataConfig], Source]] = {
    "digits": load_digits,
    "fashion-mnist": load_fashion_mnist,
    "cifar10": load_cifar,
    "cifar100": load_cifar,
    "flowers102": load_files,
    "pets": load_files,
    "food101": load_files,
    "folder": load_folder,
    "synthetic": load_synthetic,
}


@dataclass(frozen=True)
class Splits:
    """The images of a run; no image is in two splits."""

    train: Split
    val: Split
    """Held out of the official training images; empty if `val_fraction` is 0."""
    test: Split
    """Official test images only."""
    classes: int


def load_splits(config: DataConfig, normalization: Normalization) -> Splits:
    """Reads a source and cuts its splits.

    Validation takes min(val_fraction · n, val_limit) of the n official training images, training the next `train_limit`
    or all others, in an order drawn by `split_seed`; `test_limit` test images are drawn in the same way.

    Args:
        config: which source, and how it is split.
        normalization: of the images, as the model expects it.

    Raises:
        DataError: data that is missing, unreadable, of one class only, or fewer images than asked for.
        MissingDependencyError: a library that the source needs is not installed.
    """
    source = LOADERS[config.name](config)
    train_rows, val_rows = _cut_training(source, config)
    test_rows = _cut_test(source, config)
    train_labels = source.train.labels[train_rows]
    if len(train_labels.unique()) < 2:
        raise DataError(
            f"{source.where}: training needs at least two classes, got one, class {int(train_labels[0])}, in the "
            f"{len(train_rows)} selected of {len(source.train.labels)} training images; add classes or images."
        )
    train_pixels, val_pixels = source.train.select(train_rows, val_rows)
    (test_pixels,) = source.test.select(test_rows)
    size = config.image_size
    return Splits(
        train=Split(train_pixels, train_labels, size, normalization),
        val=Split(val_pixels, source.train.labels[val_rows], size, normalization),
        test=Split(test_pixels, source.test.labels[test_rows], size, normalization),
        classes=source.classes,
    )


def _cut_training(source: Source, config: DataConfig) -> tuple[Tensor, Tensor]:
    """Returns the official rows of training and validation, both int64."""
    n = len(source.train.labels)
    order = permutation(n, config.split_seed)
    val_count = min(round(config.val_fraction * n), config.val_limit)
    val, rest = order[:val_count], order[val_count:]
    if config.train_limit is not None and config.train_limit > len(rest):
        raise DataError(
            f"data.train_limit: expected at most {len(rest)}, got {config.train_limit}: {source.where} has {n} "
            f"training images, of which {val_count} are held out for validation."
        )
    return rest[: config.train_limit], val


def _cut_test(source: Source, config: DataConfig) -> Tensor:
    """Returns the official rows of the test split, int64."""
    n = len(source.test.labels)
    if config.test_limit is None:
        return torch.arange(n)
    if config.test_limit > n:
        raise DataError(
            f"data.test_limit: expected at most {n}, the test images of {source.where}, got {config.test_limit}."
        )
    return permutation(n, config.split_seed)[: config.test_limit]
