"""Safetensors files, read tensor by tensor into memory of their own.

A memory map counts every page it touches as resident, on top of the tensors copied out of it. Reading each tensor
straight into its own memory holds each value once.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thintune.errors import CheckpointError

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_LARGEST_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorSpec:
    """What the header says about a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """First byte of its values in the file."""

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile(Mapping[str, TensorSpec]):
    """The header of a safetensors file, checked, and its tensors on demand.

    Args:
        path: of the file.

    Raises:
        CheckpointError: unreadable, truncated, or no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._specs = _read_header(path)
        except OSError as error:
            raise CheckpointError(f"{path}: could not be read: {error.strerror or error}.") from error

    def __getitem__(self, name: str) -> TensorSpec:
        return self._specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def read(self, name: str) -> Tensor:
        """Reads one tensor into memory of its own, aligned as torch aligns, so that results do not depend on it.

        Raises:
            CheckpointError: the file cannot be read any more.
        """
        spec = self._specs[name]
        found = torch.empty(spec.shape, dtype=spec.dtype)
        if not found.numel():
            return found
        try:
            with open(self.path, "rb", buffering=0) as stream:
                stream.seek(spec.offset)
                _fill(stream, found.reshape(-1).view(torch.uint8).numpy().data)
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{self.path}: {name}: could not be read: {reason}.") from error
        return found

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name."""
        return {name: spec.shape for name, spec in self._specs.items()}


def _fill(stream: FileIO, target: memoryview) -> None:
    done = 0
    while done < len(target):  # one read takes at most 2 GiB
        count = stream.readinto(target[done:])
        if not count:
            raise EOFError("the file ends early")
        done += count


def _read_header(path: Path) -> dict[str, TensorSpec]:
    size = path.stat().st_size
    with open(path, "rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
        if length is None or length > min(size - 8, _LARGEST_HEADER_BYTES):
            raise _no_tensor_file(path, "its header is cut off or no header")
        text = stream.read(length)
    try:
        document = json.loads(text)
    except ValueError as error:
        raise _no_tensor_file(path, f"its header is no JSON document: {error}") from error
    if not isinstance(document, dict):
        raise _no_tensor_file(path, "its header is no JSON object")
    begin = 8 + length
    specs = {n: _spec(path, n, entry, begin) for n, entry in document.items() if n != "__metadata__"}
    specs = dict(sorted(specs.items(), key=lambda item: (item[1].offset, item[1].size_bytes)))
    expected = begin
    for name, spec in specs.items():
        if spec.offset != expected:
            raise _no_tensor_file(path, f"{name}: its values do not follow those before")
        expected += spec.size_bytes
    if expected != size:
        raise _no_tensor_file(path, f"its header describes {expected} bytes, found {size}")
    return specs


def _spec(path: Path, name: str, entry: Any, begin: int) -> TensorSpec:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _no_tensor_file(path, f"{name}: no dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if entry["dtype"] not in _DTYPES:
        raise _no_tensor_file(path, f"{name}: values of a kind that is not known, {entry['dtype']}")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise _no_tensor_file(path, f"{name}: shape {shape} and data_offsets {offsets}")
    spec = TensorSpec(_DTYPES[entry["dtype"]], tuple(shape), begin + offsets[0])
    if spec.size_bytes != offsets[1] - offsets[0]:
        raise _no_tensor_file(path, f"{name}: shape {shape} does not fit data_offsets {offsets}")
    return spec


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _no_tensor_file(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path}: truncated or no safetensors file: {why}.")
