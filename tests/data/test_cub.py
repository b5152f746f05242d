from __future__ import annotations

from pathlib import Path

import pytest
import torch

from thintune.config import DataConfig
from thintune.data import load_splits
from thintune.errors import DataError

# image number, class number, in training, colour; numbers are out of order, and classes 3 and 5 leave gaps
ROWS = [
    (7, 3, 1, (255, 0, 0)),
    (2, 5, 1, (0, 255, 0)),
    (4, 3, 0, (0, 0, 255)),
    (9, 5, 0, (255, 255, 0)),
    (1, 10, 1, (0, 255, 255)),
]


@pytest.fixture
def root(tmp_path, write_image) -> Path:
    for image, label, _, colour in ROWS:
        write_image(tmp_path / "images" / f"{label:03}.Bird" / f"a bird {image}.png", colour)
    lines = {
        "images.txt": [f"{i} {c:03}.Bird/a bird {i}.png" for i, c, _, _ in ROWS],
        "image_class_labels.txt": [f"{i} {c}" for i, c, _, _ in reversed(ROWS)],
        "train_test_split.txt": [f"{i} {t}" for i, _, t, _ in sorted(ROWS)],
    }
    for name, content in lines.items():
        (tmp_path / name).write_text("\n".join(content) + "\n")
    return tmp_path


def config(root: Path) -> DataConfig:
    return DataConfig(name="folder", root=str(root), image_size=4, val_fraction=0)


def test_the_official_split_and_labels_are_honoured(root, raw):
    splits = load_splits(config(root), raw)
    numbers = {3: 0, 5: 1, 10: 2}
    assert splits.classes == 3
    for split, flag in ((splits.train, 1), (splits.test, 0)):
        images = split.images(range(len(split)))
        got = {(tuple((i[:, 0, 0] * 255).int().tolist()), int(n)) for i, n in zip(images, split.labels, strict=True)}
        assert got == {(colour, numbers[c]) for _, c, t, colour in ROWS if t == flag}


def test_images_are_read_lazily(root, raw):
    (root / "images" / "003.Bird" / "a bird 4.png").unlink()
    splits = load_splits(config(root), raw)
    assert splits.train.images([0, 1, 2]).shape == (3, 3, 4, 4)
    with pytest.raises(DataError, match=r"a bird 4\.png: no such image"):
        splits.test.images(torch.arange(2))


@pytest.mark.parametrize("name", ["image_class_labels.txt", "train_test_split.txt"])
def test_missing_list_is_named(root, raw, name):
    (root / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: cannot be read"):
        load_splits(config(root), raw)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("images.txt", "7 003", "seven 003", r"images\.txt, line 1: expected `IMAGE VALUE`"),
        ("images.txt", "2 005.Bird/a bird 2.png", "2", r"images\.txt, line 2: expected `IMAGE VALUE`"),
        ("images.txt", "2 005", "7 005", r"images\.txt, line 2: expected .* new image number"),
        ("image_class_labels.txt", "7 3", "7 x", r"image_class_labels\.txt: expected a class number for image 7"),
        ("image_class_labels.txt", "7 3", "8 3", r"image_class_labels\.txt: .*difference at image 7"),
        ("train_test_split.txt", "7 1", "7 2", r"train_test_split\.txt: expected 0 or 1 for image 7, got '2'"),
        ("train_test_split.txt", "1 1\n", "", r"train_test_split\.txt: .*difference at image 1"),
        ("train_test_split.txt", "2 1", "2 0", r"train_test_split\.txt: .*every test class, got none of 5"),
    ],
)
def test_malformed_lists_are_named(root, raw, name, *, old, new, message):
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        load_splits(config(root), raw)


@pytest.mark.parametrize(("flag", "part"), [("1", "test"), ("0", "training")])
def test_a_split_of_one_part(root, raw, flag, part):
    (root / "train_test_split.txt").write_text("".join(f"{i} {flag}\n" for i, *_ in ROWS))
    with pytest.raises(DataError, match=rf"expected {part} images|every test class"):
        load_splits(config(root), raw)
