"""torchvision's own readers, on tiny copies of the layouts they expect; only the checksums are replaced."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torchvision import datasets

from thintune.config import DataConfig
from thintune.data import load_splits
from thintune.errors import DataError, MissingDependencyError

PER_FILE = 12


def config(name: str, root: Path, **changes) -> DataConfig:
    return DataConfig(**{"name": name, "root": str(root), "image_size": 4, "val_fraction": 0.25, **changes})


def colour_of(number: int) -> tuple[int, int, int]:
    return (number * 20, 255 - number * 20, number)


def numbers(split) -> list[int]:
    """Recovers which image is which from its colour."""
    images = (split.images(range(len(split))) * 255).round().int()
    found = images[:, 2, 0, 0]
    expected = torch.tensor([colour_of(int(n)) for n in found], dtype=torch.int32)
    assert torch.equal(images, expected[:, :, None, None].expand_as(images))
    return found.tolist()


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_pickle(path: Path, content: dict) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return md5(path)


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, tmp_path, monkeypatch) -> tuple[str, Path, dict[str, np.ndarray]]:
    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[request.param]
    key = {"cifar10": "labels", "cifar100": "fine_labels"}[request.param]
    rng = np.random.default_rng(0)
    base, known = tmp_path / cls.base_folder, {"train": [], "test": []}
    for part, listing in (("train", cls.train_list), ("test", cls.test_list)):
        entries = []
        for name, _ in listing:
            data, labels = rng.integers(0, 256, (PER_FILE, 3072), np.uint8), rng.integers(0, 3, PER_FILE).tolist()
            entries.append([name, write_pickle(base / name, {"data": data, key: labels})])
            known[part] += [(d.reshape(3, 32, 32), label) for d, label in zip(data, labels, strict=True)]
        monkeypatch.setattr(cls, f"{part}_list", entries)
    meta = dict(cls.meta)
    meta["md5"] = write_pickle(base / meta["filename"], {meta["key"]: ["ant", "bee", "cat"]})
    monkeypatch.setattr(cls, "meta", meta)
    return request.param, tmp_path, known


def test_cifar_images_arrive_with_their_labels(cifar, raw, no_network):
    name, root, known = cifar
    splits = load_splits(config(name, root, image_size=32), raw)
    n = len(known["train"])
    assert (len(splits.train), len(splits.val), len(splits.test), splits.classes) == (n * 3 // 4, n // 4, PER_FILE, 3)

    def pairs(*parts):
        return sorted(
            ((image * 255).round().to(torch.uint8).numpy().tobytes(), int(label))
            for split in parts
            for image, label in zip(split.images(range(len(split))), split.labels, strict=True)
        )

    assert pairs(splits.train, splits.val) == sorted((d.tobytes(), label) for d, label in known["train"])
    assert pairs(splits.test) == sorted((d.tobytes(), label) for d, label in known["test"])
    assert no_network == []


def test_cifar_holds_the_selected_rows_only(cifar, raw):
    name, root, _ = cifar
    splits = load_splits(config(name, root, train_limit=5, val_limit=2, test_limit=3), raw)
    assert splits.train._pixels.values.shape == (5, 32, 32, 3)
    assert splits.train._pixels.values.untyped_storage().nbytes() == 7 * 3072
    assert splits.test._pixels.values.untyped_storage().nbytes() == 3 * 3072


def test_damaged_cifar_is_downloaded_again_and_the_failure_said(cifar, raw, no_network):
    name, root, _ = cifar
    next(path for path in root.rglob("*test*")).write_bytes(b"damaged")
    with pytest.raises(DataError, match=rf"{name}: not found in {root}, and the download failed"):
        load_splits(config(name, root), raw)
    assert no_network


@pytest.fixture
def flowers(tmp_path, monkeypatch, write_image) -> Path:
    base = tmp_path / "flowers-102"
    for image in range(1, 13):
        # PNG bytes under the layout's name, so that colours are exact; Pillow goes by content.
        write_image(base / "jpg" / f"image_{image:05}.png", colour_of(image))
        (base / "jpg" / f"image_{image:05}.png").rename(base / "jpg" / f"image_{image:05}.jpg")
    savemat(base / "imagelabels.mat", {"labels": [list(range(91, 103))]})
    savemat(base / "setid.mat", {"trnid": [[2, 4, 6, 8]], "valid": [[1, 3]], "tstid": [[12, 10, 5, 7, 9, 11]]})
    sums = {key: (name, "") for key, (name, _) in datasets.Flowers102._file_dict.items()}
    sums |= {key: (sums[key][0], md5(base / sums[key][0])) for key in ("label", "setid")}
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", sums)
    return tmp_path


def test_flowers102(flowers, raw, no_network):
    splits = load_splits(config("flowers102", flowers), raw)
    assert splits.classes == 102
    assert len(splits.val) == 1
    assert sorted(numbers(splits.train) + numbers(splits.val)) == [2, 4, 6, 8]
    assert numbers(splits.test) == [12, 10, 5, 7, 9, 11]
    for split in (splits.train, splits.val, splits.test):
        assert split.labels.tolist() == [89 + number for number in numbers(split)]
    assert no_network == []


def test_flowers102_without_scipy_names_the_extra(flowers, raw, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(MissingDependencyError, match=r"data.name=flowers102: needs scipy.*thintune\[vision\]"):
        load_splits(config("flowers102", flowers), raw)


@pytest.fixture
def pets(tmp_path, write_image) -> Path:
    base = tmp_path / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    names = [("Abyssinian", 1), ("great_dane", 2), ("pug", 3)]
    for split, first in (("trainval", 0), ("test", 6)):
        lines = []
        for i in range(6):
            name, label = names[i % 3]
            write_image(base / "images" / f"{name}_{first + i}.png", colour_of(first + i))
            (base / "images" / f"{name}_{first + i}.png").rename(base / "images" / f"{name}_{first + i}.jpg")
            lines.append(f"{name}_{first + i} {label} {1 + (label > 1)} 1")
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def food(tmp_path, write_image) -> Path:
    base = tmp_path / "food-101"
    (base / "meta").mkdir(parents=True)
    for split, first in (("train", 0), ("test", 6)):
        listing: dict[str, list[str]] = {"waffles": [], "apple_pie": [], "miso_soup": []}
        order = sorted(listing)
        for i in range(6):
            name = order[i % 3]
            write_image(base / "images" / name / f"{first + i}.png", colour_of(first + i))
            (base / "images" / name / f"{first + i}.png").rename(base / "images" / name / f"{first + i}.jpg")
            listing[name].append(f"{name}/{first + i}")
        (base / "meta" / f"{split}.json").write_text(json.dumps(listing))
    return tmp_path


@pytest.mark.parametrize("name", ["pets", "food"])
def test_pets_and_food101(name, request, raw, no_network):
    splits = load_splits(config({"food": "food101"}.get(name, name), request.getfixturevalue(name)), raw)
    assert splits.classes == 3
    assert sorted(numbers(splits.train) + numbers(splits.val)) == list(range(6))
    assert sorted(numbers(splits.test)) == list(range(6, 12))
    for split in (splits.train, splits.val, splits.test):
        assert split.labels.tolist() == [number % 3 for number in numbers(split)]
    assert no_network == []


def test_image_missing_from_the_layout_is_named_when_read(pets, raw):
    (pets / "oxford-iiit-pet" / "images" / "pug_8.jpg").unlink()
    splits = load_splits(config("pets", pets), raw)
    with pytest.raises(DataError, match=r"pug_8\.jpg: no such image"):
        splits.test.images(range(6))


@pytest.mark.parametrize("damage", [lambda p: p.write_text("pug_8 3"), lambda p: p.unlink()], ids=["short", "absent"])
def test_damaged_list_is_reported(pets, raw, damage):
    damage(pets / "oxford-iiit-pet" / "annotations" / "test.txt")
    with pytest.raises(DataError, match=rf"pets in {pets}: damaged \(.*delete its folder"):
        load_splits(config("pets", pets), raw)


def test_splits_with_different_classes_are_refused(food, raw):
    path = food / "food-101" / "meta" / "test.json"
    listing = json.loads(path.read_text())
    del listing["apple_pie"]
    path.write_text(json.dumps(listing))
    with pytest.raises(DataError, match=r"expected the same classes in both splits.*apple_pie"):
        load_splits(config("food101", food), raw)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "flowers102", "pets", "food101"])
def test_absent_data_without_network_says_so_in_one_line(name, tmp_path, raw, no_network):
    with pytest.raises(DataError, match=rf"{name}: not found in .*download failed \(.*Name or service") as caught:
        load_splits(config(name, tmp_path), raw)
    assert "\n" not in str(caught.value)
    assert "--data.root" in str(caught.value)
    assert no_network


def test_default_root_is_the_cache(tmp_path, raw, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataError, match=rf"not found in {tmp_path}/\.cache/thintune"):
        load_splits(DataConfig(name="pets"), raw)


def test_root_that_is_a_file(tmp_path, raw, no_network):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="expected a folder, got a file"):
        load_splits(config("cifar10", tmp_path / "file"), raw)
    assert no_network == []


def test_missing_torchvision_names_the_extra(tmp_path, raw, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(MissingDependencyError, match=r"data.name=cifar10: needs torchvision.*thintune\[vision\]"):
        load_splits(config("cifar10", tmp_path), raw)
