"""Data sets that torchvision knows how to find, check and download; nothing of its readers outlives the selection."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thintune.config import DataConfig
from thintune.data.arrays import ArrayPart, in_blocks
from thintune.data.files import FilePart
from thintune.data.optional import missing, require
from thintune.data.source import Source
from thintune.errors import DataError

DEFAULT_ROOT = "~/.cache/thintune"
_CIFAR = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
_FILES = {
    "flowers102": ("Flowers102", "train", "test", "_image_files"),
    "pets": ("OxfordIIITPet", "trainval", "test", "_images"),
    "food101": ("Food101", "train", "test", "_image_files"),
}
"""Class, official training and test split, and the reader's list of files."""


def load_cifar(config: DataConfig) -> Source:
    """CIFAR-10 or CIFAR-100, 50,000 training and 10,000 test images, 32 × 32 in colour.

    Raises:
        DataError: data that is absent and cannot be downloaded.
        MissingDependencyError: torchvision is not installed.
    """
    root, datasets = _prepare(config)
    cls = getattr(datasets, _CIFAR[config.name])
    whole = _open(config, root, lambda download: cls(root, train=False, download=download))
    classes = len(whole.classes)
    del whole
    train, test = (_cifar_part(cls, root, files) for files in (cls.train_list, cls.test_list))
    return Source(f"{config.name} in {root}", train, test, classes)


def _cifar_part(cls: type, root: Path, files: list[list[str]]) -> ArrayPart:
    def read() -> Iterator[Any]:
        # One file at a time: torchvision's own reader holds all of them twice.
        for entry in files:
            yield type(cls.__name__, (cls,), {"train_list": [entry], "test_list": []})(root)

    def blocks() -> Iterator[np.ndarray]:
        for file in read():
            yield from in_blocks(file.data)

    labels = [torch.tensor(file.targets, dtype=torch.int64) for file in read()]
    return ArrayPart(torch.cat(labels), (32, 32, 3), blocks)


def load_files(config: DataConfig) -> Source:
    """Flowers-102 (1020 training images), Oxford-IIIT Pet (3680) or Food-101 (75,750), with their official test splits.

    Raises:
        DataError: data that is absent and cannot be downloaded, or damaged lists.
        MissingDependencyError: torchvision, or the SciPy that reads the lists of Flowers-102, is not installed.
    """
    root, datasets = _prepare(config)
    class_name, *split_names, listing = _FILES[config.name]
    cls = getattr(datasets, class_name)
    parts, classes = [], []
    for split in split_names:
        reader = _open(config, root, lambda download, split=split: cls(root, split=split, download=download))
        paths = [str(path) for path in getattr(reader, listing)]
        parts.append(FilePart(torch.tensor(reader._labels, dtype=torch.int64), paths, config.image_size))
        classes.append(reader.classes)
    if classes[0] != classes[1]:  # the readers number each split's classes on its own
        odd = sorted(set(classes[0]) ^ set(classes[1]))
        raise DataError(f"{config.name} in {root}: expected the same classes in both splits, but they differ in {odd}.")
    return Source(f"{config.name} in {root}", *parts, classes=len(classes[0]))


def _prepare(config: DataConfig) -> tuple[Path, Any]:
    root = Path(config.root or DEFAULT_ROOT).expanduser()
    if root.exists() and not root.is_dir():
        raise DataError(f"{root}: expected a folder, got a file; name another with --data.root.")
    return root, require("torchvision.datasets", f"data.name={config.name}")


def _open(config: DataConfig, root: Path, make: Callable[[bool], Any]) -> Any:
    """Opens a data set, downloading it only when torchvision does not find it."""
    try:
        return make(False)
    except RuntimeError:  # torchvision's "Dataset not found or corrupted"
        pass
    except ImportError as error:
        raise missing(f"data.name={config.name}", error) from error
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{config.name} in {root}: damaged ({_line(error)}); delete its folder there and retry."
        ) from error
    try:
        return make(True)
    except (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError) as error:
        raise DataError(
            f"{config.name}: not found in {root}, and the download failed ({_line(error)}); "
            "connect to the internet, or copy the data there or name its folder with --data.root."
        ) from error


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
