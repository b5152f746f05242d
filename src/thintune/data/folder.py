"""Image folders: train/ beside test/, classes alone, or the layout of CUB-200."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from thintune.config import DataConfig
from thintune.data.cub import is_cub, load_cub
from thintune.data.files import FilePart
from thintune.data.optional import require
from thintune.data.seeding import held_out
from thintune.data.source import Source, check_folder
from thintune.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
ADVICE = "name a folder with one folder of images a class with --data.root"


def load_folder(config: DataConfig) -> Source:
    """Reads the lists of an image folder; the classes are numbered in the order of their names.

    ROOT/train/CLASS/* and ROOT/test/CLASS/* (or ROOT/val/CLASS/*), as they are; else ROOT/CLASS/*, of which a fixed
    fifth of each class is the test split; CUB-200's official split where its three lists are beside images/.

    Raises:
        DataError: a missing folder, a class without images or a test class that training lacks.
        MissingDependencyError: Pillow is not installed.
    """
    if config.root is None:
        raise DataError(f"data.root: expected a folder for data.name=folder, got none; {ADVICE}.")
    root = Path(config.root).expanduser()
    check_folder(root, ADVICE)
    require("PIL", "data.name=folder")
    if is_cub(root):
        return load_cub(root, config.image_size)
    test_root = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if (root / "train").is_dir() and test_root is not None:
        return _load_parts(root, test_root, config.image_size)
    if (root / "train").is_dir() and _folders(root / "train"):
        raise DataError(
            f"{root}: expected test/ or val/ beside train/, got neither; add one, "
            f"or let thintune cut a test split with --data.root {root / 'train'}."
        )
    return _load_classes(root, config.image_size)


def _load_parts(root: Path, test_root: Path, size: int) -> Source:
    train, test = _list_classes(root / "train"), _list_classes(test_root)
    unknown = sorted(set(test) - set(train))
    if unknown:
        raise DataError(
            f"{test_root}: expected only classes that {root / 'train'} has, got {', '.join(unknown)}; "
            "add training images or remove the folder."
        )
    numbers = {name: number for number, name in enumerate(train)}
    return Source(str(root), _part(train, numbers, size), _part(test, numbers, size), classes=len(numbers))


def _load_classes(root: Path, size: int) -> Source:
    classes = _list_classes(root)
    everything = _part(classes, {name: number for number, name in enumerate(classes)}, size)
    train, test = (
        FilePart(everything.labels[rows], [everything.paths[row] for row in rows.tolist()], size)
        for rows in held_out(everything.labels)
    )
    return Source(str(root), train, test, classes=len(classes))


def _part(classes: dict[str, list[str]], numbers: dict[str, int], size: int) -> FilePart:
    labels = [numbers[name] for name, paths in classes.items() for _ in paths]
    return FilePart(
        torch.tensor(labels, dtype=torch.int64), [path for paths in classes.values() for path in paths], size
    )


def _list_classes(root: Path) -> dict[str, list[str]]:
    """Returns the image files of each class folder, both in the order of their names."""
    classes = {name: _image_files(root / name) for name in _folders(root)}
    if not classes:
        raise DataError(f"{root}: expected one folder a class, got no folder; {ADVICE}.")
    empty = [name for name, paths in classes.items() if not paths]
    if empty:
        raise DataError(
            f"{root}: expected images ({' '.join(SUFFIXES)}) in every class folder, got none in {', '.join(empty)}; "
            "add images or remove the folder."
        )
    return classes


def _folders(root: Path) -> list[str]:
    return [entry.name for entry in _visible_entries(root) if entry.is_dir()]


def _image_files(folder: Path) -> list[str]:
    entries = _visible_entries(folder)
    return [entry.path for entry in entries if entry.name.lower().endswith(SUFFIXES) and entry.is_file()]


def _visible_entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error}; make it readable or name another folder.") from error
