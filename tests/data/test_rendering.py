from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from thintune.data import Normalization, Split
from thintune.data.arrays import StoredImages
from thintune.errors import ConfigError

GREY = torch.randint(0, 256, (5, 6, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
COLOUR = torch.randint(0, 256, (5, 6, 9, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def split(values: torch.Tensor, size: int, normalization: Normalization) -> Split:
    return Split(StoredImages(values), torch.arange(len(values)), size, normalization)


@pytest.mark.parametrize("size", [3, 8, 20])
@pytest.mark.parametrize("values", [GREY, COLOUR, GREY[..., None]], ids=["grey", "colour", "grey with channel"])
def test_images_equal_the_written_out_equation(values, size):
    got = split(values, size, IMAGENET).images([4, 0, 4])
    channels_first = (values[..., None] if values.ndim == 3 else values).movedim(-1, 1)
    picked = channels_first[[4, 0, 4]].double() / 255
    resized = interpolate(picked, (size, size), mode="bilinear", align_corners=False, antialias=size < 9)
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in (IMAGENET.mean, IMAGENET.std))
    torch.testing.assert_close(got, ((resized.expand(-1, 3, -1, -1) - mean) / std).float(), rtol=1e-5, atol=1e-5)
    assert got.is_contiguous()


def test_same_size_is_exact_and_one_number_serves_all_channels():
    square = COLOUR[:, :6, :6]
    got = split(square, 6, Normalization((0.5,), (0.5,))).images(torch.tensor([2]))
    torch.testing.assert_close(got[0], square[2].movedim(-1, 0) / 127.5 - 1)


def test_shrinking_averages_instead_of_skipping_pixels():
    stripes = torch.zeros(1, 16, 16, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    got = split(stripes, 4, Normalization((0.0,), (1.0,))).images([0])
    assert (got - 0.5).abs().max() < 0.1


def test_reading_leaves_the_stored_bytes_alone_and_is_repeatable():
    values = COLOUR.clone()
    reader = split(values, 6, IMAGENET)
    assert torch.equal(reader.images([1]), reader.images([1]))
    assert torch.equal(values, COLOUR)


@pytest.mark.parametrize("nothing", [[], torch.tensor([], dtype=torch.int64)])
def test_no_indices_give_an_empty_batch(nothing):
    got = split(GREY, 7, IMAGENET).images(nothing)
    assert got.shape == (0, 3, 7, 7)
    assert got.dtype == torch.float32


@pytest.mark.parametrize("wrong", [[5], [-1], [0.5], torch.ones(5, dtype=torch.bool), torch.zeros(1, 1).long()])
def test_rows_that_are_not_rows_are_refused(wrong):
    with pytest.raises(IndexError, match="images: expected"):
        split(GREY, 7, IMAGENET).images(wrong)


@pytest.mark.parametrize(
    ("mean", "std"), [((0.5, 0.5), (1.0, 1.0)), ((0.5,), (1.0, 1.0, 1.0)), ((), ()), ((0.5,), (0.0,))]
)
def test_normalization_that_fits_no_image_is_refused(mean, std):
    with pytest.raises(ConfigError, match="normalization"):
        Normalization(mean, std)
