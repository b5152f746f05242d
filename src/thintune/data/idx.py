"""Fashion-MNIST from IDX files (big-endian header, then bytes; yann.lecun.com/exdb/mnist), gzip-compressed or not."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch

from thintune.config import DataConfig
from thintune.data.arrays import BLOCK_IMAGES, ArrayPart
from thintune.data.source import Source, check_folder
from thintune.errors import DataError

FASHION_MNIST_ROOT = "/usr/share/datasets/fashion-mnist"
ADVICE = "apt-get install dataset-fashion-mnist, or name the folder of the four IDX files with --data.root"
_UNSIGNED_BYTES = 0x08
_MAX_PIXELS = 2**16
"""Largest believable image: a damaged header must not ask for all memory."""


def load_fashion_mnist(config: DataConfig) -> Source:
    """Fashion-MNIST, 60,000 training and 10,000 test images, grey 28 × 28, in ten classes.

    Raises:
        DataError: a missing folder or file, or a file that is not IDX, too short or too long.
    """
    root = Path(config.root or FASHION_MNIST_ROOT).expanduser()
    check_folder(root, ADVICE)
    return Source(f"fashion-mnist in {root}", _part(root, "train"), _part(root, "t10k"), classes=10)


def _part(root: Path, prefix: str) -> ArrayPart:
    label_path = _find(root, f"{prefix}-labels-idx1-ubyte")
    image_path = _find(root, f"{prefix}-images-idx3-ubyte")
    with _open(label_path) as stream:
        (count,) = _read_shape(stream, label_path, 1)
    labels = np.concatenate([np.empty(0, np.uint8), *read_blocks(label_path, 1)])
    with _open(image_path) as stream:
        images, *shape = _read_shape(stream, image_path, 3)
    if images != count:
        raise DataError(f"{image_path}: expected {count} images, as {label_path.name} has labels, got {images}.")
    return ArrayPart(torch.from_numpy(labels.astype(np.int64)), tuple(shape), lambda: read_blocks(image_path, 3))


def read_blocks(path: Path, dimensions: int) -> Iterator[np.ndarray]:
    """Streams an IDX file of unsigned bytes.

    Args:
        path: the file, gzip-compressed if it ends in `.gz`.
        dimensions: those that its magic number must promise.

    Yields:
        uint8 (at most BLOCK_IMAGES, *shape of an item).

    Raises:
        DataError: a wrong magic number, a damaged stream, or another length than the header promises.
    """
    with _open(path) as stream:
        count, *shape = _read_shape(stream, path, dimensions)
        for start in range(0, count, BLOCK_IMAGES):
            items = min(BLOCK_IMAGES, count - start)
            yield np.frombuffer(_read_exactly(stream, path, items * math.prod(shape)), np.uint8).reshape(items, *shape)
        if stream.read(1):
            raise DataError(f"{path}: expected {count} items of shape {tuple(shape)}, got more; fetch the file again.")


def _read_shape(stream: BinaryIO, path: Path, dimensions: int) -> tuple[int, ...]:
    magic = _read_exactly(stream, path, 4)
    expected = bytes([0, 0, _UNSIGNED_BYTES, dimensions])
    if magic != expected:
        raise DataError(f"{path}: expected an IDX file with magic number 0x{expected.hex()}, got 0x{magic.hex()}.")
    shape = np.frombuffer(_read_exactly(stream, path, 4 * dimensions), ">u4").tolist()
    if not 1 <= math.prod(shape[1:]) <= _MAX_PIXELS:
        raise DataError(f"{path}: expected images of 1 to {_MAX_PIXELS} pixels, got shape {tuple(shape[1:])}.")
    return tuple(shape)


def _read_exactly(stream: BinaryIO, path: Path, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise DataError(f"{path}: truncated: expected {size} more bytes, got {len(data)}; fetch the file again.")
    return data


def _find(root: Path, name: str) -> Path:
    for path in (root / f"{name}.gz", root / name):
        if path.is_file():
            return path
    raise DataError(f"{root / name}.gz: no such file, compressed or not; {ADVICE}.")


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading, and names it in whatever goes wrong until it is closed."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            yield cast(BinaryIO, stream)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read to its end: {error}; fetch the file again.") from error
