from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from thintune.data.files import decode
from thintune.errors import DataError


def gradient(width: int, height: int) -> np.ndarray:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, (x + y) / 2], -1).round().astype(np.uint8)


@pytest.mark.parametrize(("width", "height"), [(40, 24), (24, 40), (24, 24), (12, 30), (2000, 1301)])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_shorter_side_is_resized_and_the_centre_cropped(tmp_path, width, height, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(gradient(width, height)).save(path, quality=95)
    size = 16
    with Image.open(path) as image:
        scale = size / min(width, height)
        resized = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    expected = np.asarray(resized.crop((left, top, left + size, top + size))).astype(int)
    got = decode(str(path), size)
    assert got.shape == (size, size, 3)
    assert got.dtype == np.uint8
    # Half a pixel of rounding in the crop is at most half the step of this gradient.
    tolerance = 255 / size / 2 + 3
    assert np.abs(got - expected).max() <= tolerance
    assert np.abs((got - expected).mean()) <= tolerance / 2


def test_same_size_is_untouched(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    np.testing.assert_array_equal(decode(str(tmp_path / "image.png"), 9), pixels)


def test_large_jpeg_is_not_decoded_whole(tmp_path, monkeypatch):
    path = tmp_path / "large.jpg"
    Image.fromarray(gradient(1200, 900)).save(path)
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **k: sizes.append(self.size) or resize(self, *a, **k))
    decode(str(path), 32)
    assert sizes == [(150, 113)]


MODES = {
    "grey": ("L", 100, (100, 100, 100)),
    "transparent": ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
    "black and white": ("1", 1, (255, 255, 255)),
    "grey with transparency": ("LA", (7, 255), (7, 7, 7)),
    "16 bits": ("I;16", 257 * 100 + 155, (100, 100, 100)),
}


@pytest.mark.parametrize(("mode", "value", "expected"), MODES.values(), ids=list(MODES))
def test_every_kind_of_pixel_becomes_rgb(tmp_path, mode, value, expected):
    path = tmp_path / "image.png"
    Image.new(mode, (5, 8), value).save(path)
    assert (decode(str(path), 4) == expected).all()


def test_palette_with_transparent_bytes_passes_without_warning(tmp_path):
    image = Image.new("P", (6, 6), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.save(tmp_path / "image.png", transparency=bytes([0, 255]))
    assert (decode(str(tmp_path / "image.png"), 3) == (10, 200, 30)).all()


def test_floating_point_pixels_have_no_known_range(tmp_path):
    path = tmp_path / "image.tiff"
    Image.new("F", (4, 4), 0.5).save(path)
    with pytest.raises(DataError, match=r"image\.tiff.*8 or 16 bits"):
        decode(str(path), 4)


def damage_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_all(path: Path) -> None:
    path.write_bytes(b"not an image")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("damage", [damage_half, damage_all, lambda path: path.write_bytes(b"")])
def test_damaged_image_is_named(tmp_path, suffix, damage):
    path = tmp_path / f"broken.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    damage(path)
    with pytest.raises(DataError, match=rf"broken\.{suffix}: cannot be read as an image") as caught:
        decode(str(path), 8)
    assert "\n" not in str(caught.value)


def test_missing_image_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jpg: no such image"):
        decode(str(tmp_path / "gone.jpg"), 8)


def test_memory_error_is_not_blamed_on_the_image(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    Image.new("RGB", (4, 4)).save(path)

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "resize", fail)
    with pytest.raises(MemoryError):
        decode(str(path), 8)
