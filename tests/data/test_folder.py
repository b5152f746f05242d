from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from thintune.config import DataConfig
from thintune.data import load_splits
from thintune.errors import DataError, MissingDependencyError

COLOURS = {"ant": (255, 0, 0), "bee": (0, 255, 0), "cat": (0, 0, 255)}


def config(root: Path, **changes) -> DataConfig:
    return DataConfig(**{"name": "folder", "root": str(root), "image_size": 4, "val_fraction": 0.25, **changes})


def colours_match_labels(split, order: list[str]) -> bool:
    """Whether every image has the colour of its label's class; colours survive PNG and resizing exactly."""
    images = split.images(range(len(split)))
    expected = torch.tensor([COLOURS[order[label]] for label in split.labels.tolist()]) / 255
    return torch.equal(images, expected[:, :, None, None].expand_as(images))


def stems(split) -> list[str]:
    return sorted("/".join(Path(path).parts[-2:]) for path in split._pixels.paths)


@pytest.fixture
def classes(tmp_path, write_image):
    def make(root: Path, counts: dict[str, int]) -> Path:
        for name, count in counts.items():
            (root / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                write_image(root / name / f"{i}.png", COLOURS.get(name, (9, 9, 9)), size=(5 + i, 7))
        return root

    return make


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_train_beside_test_is_kept_as_it_is(tmp_path, classes, raw, test_name):
    classes(tmp_path / "train", {"cat": 4, "ant": 8, "bee": 4})
    classes(tmp_path / test_name, {"cat": 2, "bee": 3})
    splits = load_splits(config(tmp_path), raw)
    assert (len(splits.train), len(splits.val), len(splits.test), splits.classes) == (12, 4, 5, 3)
    assert splits.test.labels.tolist() == [1, 1, 1, 2, 2]
    assert torch.cat([splits.train.labels, splits.val.labels]).bincount().tolist() == [8, 4, 4]
    assert all(colours_match_labels(s, ["ant", "bee", "cat"]) for s in (splits.train, splits.val, splits.test))
    assert not set(stems(splits.train)) & set(stems(splits.val))
    assert all(test_name in Path(path).parts for path in splits.test._pixels.paths)


def test_test_goes_before_val(tmp_path, classes, raw):
    for name, count in (("train", 3), ("test", 1), ("val", 2)):
        classes(tmp_path / name, {"ant": count, "bee": count})
    splits = load_splits(config(tmp_path), raw)
    assert len(splits.test) == 2
    assert len(splits.train) + len(splits.val) == 6


def test_classes_alone_are_cut_once_for_every_split_seed(tmp_path, classes, raw):
    classes(tmp_path, {"ant": 10, "bee": 5, "cat": 2})
    splits, other = (load_splits(config(tmp_path, split_seed=seed), raw) for seed in (0, 1))
    assert splits.test.labels.bincount().tolist() == [2, 1, 1]
    assert len(splits.train) + len(splits.val) == 13
    assert splits.test._pixels.paths == other.test._pixels.paths
    assert not set(stems(splits.test)) & set(stems(splits.train) + stems(splits.val))
    assert all(colours_match_labels(s, ["ant", "bee", "cat"]) for s in (splits.train, splits.val, splits.test))


def test_the_cut_does_not_depend_on_where_the_folder_is(tmp_path, classes, raw):
    classes(tmp_path / "here", {"ant": 10, "bee": 10})
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here, there = (load_splits(config(tmp_path / name), raw) for name in ("here", "there"))
    assert stems(here.test) == stems(there.test)


def test_hidden_entries_and_other_files_are_passed_over(tmp_path, classes, raw):
    classes(tmp_path, {"ant": 3, "bee": 3})
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README").touch()
    (tmp_path / "ant" / "notes.txt").touch()
    (tmp_path / "ant" / "._0.png").touch()
    (tmp_path / "ant" / "0.png").rename(tmp_path / "ant" / "0.PNG")
    splits = load_splits(config(tmp_path, val_fraction=0), raw)
    assert (len(splits.train) + len(splits.test), splits.classes) == (6, 2)


def test_home_is_expanded(tmp_path, classes, raw, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    classes(tmp_path / "pictures", {"ant": 3, "bee": 3})
    assert load_splits(DataConfig(name="folder", root="~/pictures"), raw).classes == 2


def test_nothing_is_decoded_before_it_is_asked_for(tmp_path, classes, raw):
    classes(tmp_path, {"ant": 4, "bee": 4})
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"broken")
    splits = load_splits(config(tmp_path), raw)
    with pytest.raises(DataError, match=r"(ant|bee)/\d\.png: cannot be read as an image"):
        splits.train.images([0])


def test_no_root(raw):
    with pytest.raises(DataError, match=r"data\.root: expected a folder"):
        load_splits(DataConfig(name="folder"), raw)


def test_missing_root(tmp_path, raw):
    with pytest.raises(DataError, match="absent: no such folder"):
        load_splits(config(tmp_path / "absent"), raw)


def test_root_that_is_a_file(tmp_path, raw):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: expected a folder, got a file"):
        load_splits(config(tmp_path / "file"), raw)


def test_empty_root(tmp_path, raw):
    with pytest.raises(DataError, match="expected one folder a class, got no folder"):
        load_splits(config(tmp_path), raw)


def test_every_empty_class_is_named(tmp_path, classes, raw):
    classes(tmp_path, {"ant": 3, "bee": 0, "cat": 0})
    with pytest.raises(DataError, match="got none in bee, cat"):
        load_splits(config(tmp_path), raw)


def test_one_class(tmp_path, classes, raw):
    classes(tmp_path, {"ant": 5})
    with pytest.raises(DataError, match="training needs at least two classes"):
        load_splits(config(tmp_path), raw)


def test_too_few_images_for_a_test_split(tmp_path, classes, raw):
    classes(tmp_path, {"ant": 1, "bee": 1})
    with pytest.raises(DataError, match="expected test images, got none"):
        load_splits(config(tmp_path), raw)


def test_test_class_without_training_images(tmp_path, classes, raw):
    classes(tmp_path / "train", {"ant": 2, "bee": 2})
    classes(tmp_path / "test", {"ant": 2, "cat": 1, "dog": 1})
    with pytest.raises(DataError, match=r"expected only classes that .*train has, got cat, dog"):
        load_splits(config(tmp_path), raw)


def test_train_without_test(tmp_path, classes, raw):
    classes(tmp_path / "train", {"ant": 2, "bee": 2})
    with pytest.raises(DataError, match=r"expected test/ or val/ beside train/.*--data\.root .*train"):
        load_splits(config(tmp_path), raw)


def test_a_class_may_be_called_train(tmp_path, classes, raw):
    classes(tmp_path, {"train": 3, "plane": 3})
    assert load_splits(config(tmp_path), raw).classes == 2


def test_more_training_images_than_there_are(tmp_path, classes, raw):
    classes(tmp_path, {"ant": 10, "bee": 10})
    with pytest.raises(DataError, match=r"train_limit: expected at most 12, got 13: .* has 16 training images.* 4 are"):
        load_splits(config(tmp_path, train_limit=13), raw)


def test_missing_pillow_names_the_extra(tmp_path, monkeypatch, raw):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match=r"data.name=folder: needs PIL.*thintune\[vision\]"):
        load_splits(config(tmp_path), raw)
