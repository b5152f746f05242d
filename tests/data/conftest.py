"""Tiny copies of the layouts that the sources read."""

from __future__ import annotations

import gzip
import struct
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from thintune.data import Normalization


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cuts the network, and collects what was asked of it."""
    asked: list[str] = []

    def refuse(request, *_, **__):
        asked.append(getattr(request, "full_url", request))
        raise urllib.error.URLError("Name or service\nnot known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return asked


@pytest.fixture
def raw() -> Normalization:
    """Leaves images in [0, 1]."""
    return Normalization((0.0,), (1.0,))


@pytest.fixture
def write_image() -> Callable[..., Path]:
    """Writes an image file of one colour."""

    def write(path: Path, colour=(255, 0, 0), size=(6, 6), mode="RGB") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, colour).save(path)
        return path

    return write


@pytest.fixture
def write_idx() -> Callable[..., None]:
    """Writes an IDX file; `.gz` in the name compresses it."""

    def write(path: Path, values: np.ndarray, magic: bytes | None = None) -> None:
        header = magic or bytes([0, 0, 8, values.ndim])
        payload = header + struct.pack(f">{values.ndim}I", *values.shape) + values.astype(np.uint8).tobytes()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(payload) if path.suffix == ".gz" else payload)

    return write
