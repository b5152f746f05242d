"""The layout of CUB-200: images/CLASS/*.jpg, and three lists that number, label and split them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from thintune.data.files import FilePart
from thintune.data.source import Source
from thintune.errors import DataError

IMAGES, LABELS, SPLIT = LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt")


def is_cub(root: Path) -> bool:
    """Whether the folder has images/ and the list of them."""
    return (root / "images").is_dir() and (root / IMAGES).is_file()


def load_cub(root: Path, size: int) -> Source:
    """Reads CUB-200's lists and honours its official split.

    Raises:
        DataError: a list that is missing, malformed or about other images than the first, or a test class that training
            lacks.
    """
    names, labels, in_train = (_read_list(root / name) for name in LISTS)
    for name, values in ((LABELS, labels), (SPLIT, in_train)):
        if values.keys() != names.keys():
            odd = min(values.keys() ^ names.keys())
            raise DataError(f"{root / name}: expected the image numbers of {IMAGES}, got a difference at image {odd}.")
    _check_values(root / LABELS, labels, str.isdecimal, "a class number")
    _check_values(root / SPLIT, in_train, ("0", "1").__contains__, "0 or 1")

    numbers = {label: number for number, label in enumerate(sorted(set(labels.values()), key=int))}
    train, test = (
        FilePart(
            torch.tensor([numbers[labels[image]] for image in names if in_train[image] == flag], dtype=torch.int64),
            [str(root / "images" / names[image]) for image in names if in_train[image] == flag],
            size,
        )
        for flag in ("1", "0")
    )
    unknown = sorted(set(test.labels.tolist()) - set(train.labels.tolist()))
    if unknown:
        wanted = [label for label, number in numbers.items() if number in unknown]
        raise DataError(
            f"{root / SPLIT}: expected training images of every test class, got none of {', '.join(wanted)}."
        )
    return Source(str(root), train, test, classes=len(numbers))


def _read_list(path: Path) -> dict[int, str]:
    """Reads lines of `IMAGE VALUE`."""
    values: dict[int, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); CUB-200 needs {', '.join(LISTS)}.") from error
    for number, line in enumerate(lines, 1):
        image, _, value = line.strip().partition(" ")
        if not image and not value:
            continue
        if not image.isdecimal() or not value or int(image) in values:
            raise DataError(f"{path}, line {number}: expected `IMAGE VALUE` with a new image number, got {line!r}.")
        values[int(image)] = value.strip()
    return values


def _check_values(path: Path, values: dict[int, str], valid: Callable[[str], bool], expected: str) -> None:
    for image, value in values.items():
        if not valid(value):
            raise DataError(f"{path}: expected {expected} for image {image}, got {value!r}.")
