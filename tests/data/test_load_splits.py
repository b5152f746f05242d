"""The cut into splits, on the sources that need no files: digits and synthetic."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thintune.config import SOURCES, DataConfig
from thintune.data import Normalization, load_splits
from thintune.data.arrays import gather, in_blocks
from thintune.data.seeding import held_out
from thintune.data.splits import LOADERS
from thintune.errors import DataError, MissingDependencyError

RAW = Normalization((0.0,), (1.0,))


def rows(split) -> list[bytes]:
    """The bytes of each image: synthetic images all differ, so these name them."""
    images = split.images(range(len(split)))
    return [image.numpy().tobytes() for image in images]


def test_every_source_has_a_loader():
    assert set(LOADERS) == set(SOURCES)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(10, 90),
    val_fraction=st.floats(0, 0.4),
    val_limit=st.integers(1, 60),
    seed=st.integers(-(2**70), 2**70),
    share=st.floats(0.5, 1),
    limited=st.booleans(),
)
def test_splits_are_disjoint_and_of_the_promised_sizes(*, n, val_fraction, val_limit, seed, share, limited):
    val_count = min(round(val_fraction * n), val_limit)
    # more than half of two balanced classes: both are there
    train_limit = max(n // 2 + 1, int(share * (n - val_count))) if limited else None
    config = DataConfig(
        name="synthetic", image_size=3, synthetic_images=n, synthetic_classes=2, val_fraction=val_fraction,
        val_limit=val_limit, split_seed=seed, train_limit=train_limit,
    )  # fmt: skip
    splits = load_splits(config, RAW)
    train, val, test = map(rows, (splits.train, splits.val, splits.test))
    assert (len(val), len(train)) == (val_count, train_limit or n - val_count)
    assert len(test) == max(64, n // 4)
    assert len({*train, *val, *test}) == len(train) + len(val) + len(test)


def test_the_cut_is_the_documented_permutation():
    whole = load_splits(DataConfig(name="digits", val_fraction=0, image_size=8), RAW)
    cut = load_splits(DataConfig(name="digits", val_fraction=0.2, val_limit=50, train_limit=30, image_size=8), RAW)
    assert len(cut.val) == 50
    assert torch.equal(torch.cat([cut.val.labels, cut.train.labels]), whole.train.labels[:80])
    assert rows(cut.val) + rows(cut.train) == rows(whole.train)[:80]


def test_zero_fraction_gives_an_empty_validation_split():
    splits = load_splits(DataConfig(name="digits", val_fraction=0, image_size=9), RAW)
    assert len(splits.val) == 0
    assert splits.val.labels.dtype == torch.int64
    assert splits.val.images([]).shape == (0, 3, 9, 9)
    assert len(splits.train) + len(splits.test) == 1797


def test_split_seed_moves_validation_but_never_the_test_images():
    first, again, other = (
        load_splits(DataConfig(name="digits", image_size=8, split_seed=seed), RAW) for seed in (0, 0, 1)
    )
    assert rows(first.train) == rows(again.train)
    assert rows(first.test) == rows(other.test)
    assert rows(first.val) != rows(other.val)
    assert sorted(rows(first.train) + rows(first.val)) == sorted(rows(other.train) + rows(other.val))


def test_test_limit_draws_by_split_seed():
    whole = load_splits(DataConfig(name="digits", image_size=8), RAW)
    few = [load_splits(DataConfig(name="digits", image_size=8, test_limit=40, split_seed=s), RAW) for s in (0, 0, 1)]
    assert rows(few[0].test) == rows(few[1].test) != rows(few[2].test)
    assert len(few[0].test) == 40
    assert set(rows(few[0].test)) <= set(rows(whole.test))


def test_digits_are_the_bundled_ones_with_a_stratified_test_split():
    from sklearn.datasets import load_digits

    splits = load_splits(DataConfig(name="digits", image_size=8), RAW)
    images, targets = load_digits(return_X_y=True)
    known = {np.rint(i * 255 / 16).astype(np.uint8).tobytes(): t for i, t in zip(images, targets, strict=True)}
    assert splits.classes == 10
    for split in (splits.train, splits.val, splits.test):
        values = (split.images(range(len(split))) * 255).round().to(torch.uint8)
        assert all(known[v[0].numpy().tobytes()] == label for v, label in zip(values, split.labels, strict=True))
    share = splits.test.labels.bincount() / torch.from_numpy(targets).bincount()
    assert ((share - 0.2).abs() < 0.004).all()


def test_selected_images_are_held_once_as_bytes():
    splits = load_splits(DataConfig(name="digits", image_size=224, train_limit=100, val_limit=20, test_limit=10), RAW)
    train, val, test = (split._pixels.values for split in (splits.train, splits.val, splits.test))
    assert {t.dtype for t in (train, val, test)} == {torch.uint8}
    assert train.untyped_storage().data_ptr() == val.untyped_storage().data_ptr()
    assert train.untyped_storage().nbytes() == (100 + 20) * 64
    assert test.untyped_storage().nbytes() == 10 * 64


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"train_limit": 1295}, r"data\.train_limit: expected at most 1294, got 1295: digits has 1438 .* 144 are held"),
        ({"test_limit": 360}, r"data\.test_limit: expected at most 359, .*got 360"),
        ({"train_limit": 1}, "at least two classes, got one, class ., in the 1 selected of 1438"),
    ],
)
def test_limits_beyond_the_data_are_refused(limits, message):
    with pytest.raises(DataError, match=message) as caught:
        load_splits(DataConfig(name="digits", **limits), RAW)
    assert "\n" not in str(caught.value)


def test_all_that_is_left_may_be_asked_for():
    splits = load_splits(DataConfig(name="digits", train_limit=1294, test_limit=359), RAW)
    assert (len(splits.train), len(splits.test)) == (1294, 359)


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependencyError, match=r"data.name=digits: needs sklearn.*thintune\[vision\]"):
        load_splits(DataConfig(name="digits"), RAW)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=80))
def test_held_out_is_a_fixed_fifth_of_each_class(labels):
    labels = torch.tensor(labels)
    train, test = held_out(labels)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(labels)))
    for label in labels.unique():
        count, held = int((labels == label).sum()), int((labels[test] == label).sum())
        assert held == (0 if count == 1 else max(1, round(count / 5)))


@given(st.lists(st.integers(0, 29), max_size=60), st.integers(1, 31))
def test_gathering_from_blocks_is_indexing(wanted, block):
    values = np.random.default_rng(0).integers(0, 256, (30, 2, 5), np.uint8)
    picked = np.array(wanted, dtype=np.int64)
    got = gather((values[i : i + block] for i in range(0, 30, block)), picked, (2, 5))
    np.testing.assert_array_equal(got, values[picked])


def test_blocks_are_views_of_the_whole():
    values = np.zeros((2500, 2), np.uint8)
    blocks = list(in_blocks(values))
    assert [len(block) for block in blocks] == [1024, 1024, 452]
    assert all(np.shares_memory(block, values) for block in blocks)
