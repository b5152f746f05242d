from __future__ import annotations

import pytest
import torch

from thintune.config import DataConfig
from thintune.data import Normalization, load_splits
from thintune.data.synthetic import SyntheticImages
from thintune.errors import DataError

RAW = Normalization((0.0,), (1.0,))


def config(**changes) -> DataConfig:
    return DataConfig(**{"name": "synthetic", "image_size": 13, "synthetic_images": 100, "val_fraction": 0, **changes})


@pytest.mark.parametrize(("images", "test_images"), [(8, 64), (256, 64), (400, 100)])
def test_sizes_of_the_splits(images, test_images):
    splits = load_splits(config(synthetic_images=images, synthetic_classes=4), RAW)
    assert (len(splits.train), len(splits.test), splits.classes) == (images, test_images, 4)


def test_images_are_repeatable_noise_in_the_whole_range_and_all_differ():
    splits = load_splits(config(), RAW)
    images = splits.train.images(range(100))
    assert images.shape == (100, 3, 13, 13)
    assert torch.equal(images[[7, 3]], load_splits(config(), RAW).train.images([7, 3]))
    assert images.min() == 0 and images.max() == 1
    assert abs(images.mean() - 0.5) < 0.01
    everything = torch.cat([images, splits.test.images(range(64))]).flatten(1)
    assert len(everything.unique(dim=0)) == 164


def test_labels_are_balanced_and_out_of_order():
    labels = load_splits(config(synthetic_classes=7), RAW).train.labels
    counts = labels.bincount(minlength=7)
    assert counts.max() - counts.min() <= 1
    assert labels.tolist() != sorted(labels.tolist())


def test_image_and_label_stay_together_under_another_split_seed():
    def pairs(seed):
        train = load_splits(config(split_seed=seed), RAW).train
        images = train.images(range(len(train)))
        return {(i.numpy().tobytes(), int(label)) for i, label in zip(images, train.labels, strict=True)}

    assert pairs(0) == pairs(1)


def test_no_image_is_stored():
    pixels = load_splits(config(image_size=4096), RAW).train._pixels
    assert isinstance(pixels, SyntheticImages)
    assert pixels.rows.shape == (100,)


def test_one_image_has_one_class():
    with pytest.raises(DataError, match="at least two classes"):
        load_splits(config(synthetic_images=1), RAW)
