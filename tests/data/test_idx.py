from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from thintune.config import DataConfig
from thintune.data import load_splits
from thintune.data.idx import FASHION_MNIST_ROOT
from thintune.errors import DataError

TRAIN, TEST = 1100, 30  # more than one block
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte": rng.integers(0, 256, (TRAIN, 5, 7)),
        "train-labels-idx1-ubyte": rng.integers(0, 10, TRAIN),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (TEST, 5, 7)),
        "t10k-labels-idx1-ubyte": rng.integers(0, 10, TEST),
    }


@pytest.fixture(params=[".gz", ""], ids=["gz", "plain"])
def root(request, tmp_path, write_idx) -> Path:
    for name, values in arrays().items():
        write_idx(tmp_path / f"{name}{request.param}", values)
    return tmp_path


@pytest.fixture
def gz_root(tmp_path, write_idx) -> Path:
    for name, values in arrays().items():
        write_idx(tmp_path / f"{name}.gz", values)
    return tmp_path


def config(root: Path, **changes) -> DataConfig:
    return DataConfig(name="fashion-mnist", root=str(root), image_size=5, **changes)


def test_every_image_arrives_with_its_label(root, raw):
    splits = load_splits(config(root), raw)
    assert (len(splits.train), len(splits.val), len(splits.test), splits.classes) == (990, 110, 30, 10)
    expected = arrays()
    known = {i.astype(np.uint8).tobytes(): t for i, t in zip(expected[IMAGES], expected[LABELS], strict=True)}
    seen = []
    for split in (splits.train, splits.val):
        stored = [image.numpy().tobytes() for image in split._pixels.values]
        assert [known[image] for image in stored] == split.labels.tolist()
        seen += stored
    assert sorted(seen) == sorted(known)
    np.testing.assert_array_equal(splits.test._pixels.values, expected["t10k-images-idx3-ubyte"])
    assert splits.test.labels.tolist() == expected["t10k-labels-idx1-ubyte"].tolist()
    assert splits.train.images([0, 1]).shape == (2, 3, 5, 5)


def test_only_the_selected_rows_are_held(root, raw):
    splits = load_splits(config(root, train_limit=20, val_limit=10, test_limit=5), raw)
    assert splits.train._pixels.values.untyped_storage().nbytes() == (20 + 10) * 35
    assert splits.test._pixels.values.untyped_storage().nbytes() == 5 * 35
    assert splits.train._pixels.values.dtype == torch.uint8


def test_missing_folder_says_how_to_get_it(tmp_path, raw):
    with pytest.raises(DataError, match=r"absent: no such folder; apt-get install dataset-fashion-mnist.*--data\.root"):
        load_splits(config(tmp_path / "absent"), raw)


def test_default_root_is_the_debian_package():
    assert FASHION_MNIST_ROOT == "/usr/share/datasets/fashion-mnist"


def test_root_that_is_a_file(tmp_path, raw):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="expected a folder, got a file"):
        load_splits(config(tmp_path / "file"), raw)


@pytest.mark.parametrize("name", list(arrays()))
def test_missing_file_is_named(gz_root, raw, name):
    (gz_root / f"{name}.gz").unlink()
    with pytest.raises(DataError, match=rf"{name}.*no such file.*apt-get install"):
        load_splits(config(gz_root), raw)


@pytest.mark.parametrize("name", list(arrays()))
@pytest.mark.parametrize("kept", [0, 2, 9, -1])
def test_truncated_file_is_named(root, raw, name, kept):
    path = next(root.glob(f"{name}*"))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=rf"{name}.*(truncated|cannot be read to its end)"):
        load_splits(config(root), raw)


def test_truncated_inside_a_sound_gzip_stream(gz_root, raw):
    path = gz_root / f"{IMAGES}.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-3]))
    with pytest.raises(DataError, match=rf"{IMAGES}\.gz: truncated: expected 2660 more bytes, got 2657"):
        load_splits(config(gz_root), raw)


def test_damaged_gzip_bytes(gz_root, raw):
    path = gz_root / f"{IMAGES}.gz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match=IMAGES):
        load_splits(config(gz_root), raw)


def test_more_bytes_than_promised(root, raw):
    path = next(root.glob(f"{IMAGES}*"))
    extra = b"more"
    path.write_bytes(path.read_bytes() + (gzip.compress(extra) if path.suffix == ".gz" else extra))
    with pytest.raises(DataError, match=rf"{IMAGES}.*expected 1100 items of shape \(5, 7\), got more"):
        load_splits(config(root), raw)


def test_wrong_magic_number(gz_root, raw, write_idx):
    write_idx(gz_root / f"{IMAGES}.gz", arrays()[IMAGES], magic=bytes([0, 0, 0x0D, 3]))
    with pytest.raises(DataError, match=rf"{IMAGES}.*magic number 0x00000803, got 0x00000d03"):
        load_splits(config(gz_root), raw)


def test_not_gzip_at_all(gz_root, raw):
    (gz_root / f"{LABELS}.gz").write_text("<html>404</html>")
    with pytest.raises(DataError, match=LABELS):
        load_splits(config(gz_root), raw)


def test_images_and_labels_of_different_number(gz_root, raw, write_idx):
    write_idx(gz_root / f"{LABELS}.gz", arrays()[LABELS][:-1])
    with pytest.raises(DataError, match=rf"{IMAGES}.*expected 1099 images.*got 1100"):
        load_splits(config(gz_root), raw)


def test_label_out_of_range(gz_root, raw, write_idx):
    write_idx(gz_root / f"{LABELS}.gz", arrays()[LABELS] + 20)
    with pytest.raises(DataError, match=r"training labels from 0 to 9, got 20\.\.29"):
        load_splits(config(gz_root), raw)


@pytest.mark.parametrize("shape", [(TRAIN, 0, 7), (TRAIN, 40000, 40000)])
def test_absurd_image_shapes_are_refused_before_memory_is_asked_for(gz_root, raw, shape):
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in shape)
    (gz_root / f"{IMAGES}.gz").write_bytes(gzip.compress(header))
    with pytest.raises(DataError, match=rf"{IMAGES}.*expected images of 1 to 65536 pixels"):
        load_splits(config(gz_root), raw)


def test_no_images_at_all(gz_root, raw, write_idx):
    write_idx(gz_root / "t10k-images-idx3-ubyte.gz", np.empty((0, 5, 7)))
    write_idx(gz_root / "t10k-labels-idx1-ubyte.gz", np.empty(0))
    with pytest.raises(DataError, match="expected test images, got none"):
        load_splits(config(gz_root), raw)


@pytest.mark.skipif(not Path(FASHION_MNIST_ROOT).is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_the_real_data_set(raw):
    splits = load_splits(DataConfig(name="fashion-mnist", image_size=28, train_limit=500, test_limit=200), raw)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (500, 1000, 200)
    assert splits.train._pixels.values.shape == (500, 28, 28)
    mean = splits.val.images(range(1000)).mean()
    assert abs(mean - 0.286) < 0.02
    assert set(splits.train.labels.tolist()) == set(range(10))
