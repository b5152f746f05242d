"""Tensors and a document, saved as one: safetensors beside JSON.

The tensor file carries the start of its checksum in its name and the JSON file names it, so that renaming the JSON is
the moment the new pair replaces the old one. A process killed at any instant leaves one pair or the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thintune.errors import CheckpointError, OutputError
from thintune.io.files import prepare_directory, read_document, sync_directory, write_text
from thintune.io.tensor_file import DTYPE_NAMES, TensorFile


@dataclass(frozen=True)
class StoredTensors:
    """A pair read back: the document, and the checked file of tensors."""

    document: dict[str, Any]
    path: Path

    def open(self) -> TensorFile:
        """Names, shapes and kinds of the tensors, and each of them on demand.

        Raises:
            CheckpointError: no safetensors file.
        """
        return TensorFile(self.path)

    def load(self) -> dict[str, Tensor]:
        """Reads every tensor into memory of its own; no value is held twice.

        Raises:
            CheckpointError: no safetensors file.
        """
        stored = self.open()
        return {name: stored.read(name) for name in stored}


def write_tensors(folder: Path, stem: str, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    """Writes `FOLDER/STEM-CHECKSUM.safetensors` and `FOLDER/STEM.json`, then removes the pair before and any leftovers.

    Tensors are streamed to the file one at a time; no second copy of the whole is held.

    Raises:
        OutputError: the file system refused; the pair before is as it was.
        CheckpointError: a tensor of a kind that cannot be stored; nothing was written.
    """
    header = _header(tensors)
    prepare_directory(folder)
    temporary = folder / f".{stem}.{os.getpid()}.tmp"
    try:
        digest = _stream(temporary, header, tensors)
        path = folder / f"{stem}-{digest[:16]}.safetensors"
        size = temporary.stat().st_size
        os.replace(temporary, path)
        sync_directory(folder)
    except OSError as error:
        raise OutputError(f"{folder / stem}: could not be written: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    described = {**document, "tensors": {"file": path.name, "sha256": digest, "bytes": size}}
    try:
        write_text(folder / f"{stem}.json", json.dumps(described, indent=2) + "\n")
    finally:
        _remove_leftovers(folder, stem)


def _remove_leftovers(folder: Path, stem: str) -> None:
    """Removes every file of the stem but the pair that the JSON file names: older ones, and those of killed writers."""
    try:
        named = read_document(folder / f"{stem}.json")["tensors"]["file"]
    except (CheckpointError, KeyError, TypeError):
        named = None
    for other in [*folder.glob(f"{stem}-*.safetensors"), *folder.glob(f".{stem}.*tmp")]:
        if other.name != named:
            with contextlib.suppress(OSError):  # a leftover takes room and harms nothing
                other.unlink(missing_ok=True)


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """The header of a safetensors file, padded to 8 bytes."""
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES or tensor.is_meta:
            kind = "a tensor without values (meta device)" if tensor.is_meta else str(tensor.dtype)
            raise CheckpointError(f"{name}: expected values of a kind that safetensors files hold, got {kind}.")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)


def _stream(path: Path, header: bytes, tensors: Mapping[str, Tensor]) -> str:
    """Writes a safetensors file tensor by tensor; returns its SHA-256."""
    checksum = hashlib.sha256()
    with open(path, "wb") as stream:
        for chunk in _chunks(header, tensors.values()):
            checksum.update(chunk)
            stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())
    return checksum.hexdigest()


def _chunks(header: bytes, tensors: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    yield struct.pack("<Q", len(header))
    yield header
    for tensor in tensors:
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_tensors(folder: Path, stem: str) -> StoredTensors:
    """Reads and checks a pair.

    Raises:
        CheckpointError: missing, truncated, or with another checksum than the JSON file says.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected the folder of a checkpoint, found {_kind(folder)}.")
    document = read_document(folder / f"{stem}.json")
    described = document.get("tensors")
    if not isinstance(described, dict) or not {"file", "sha256", "bytes"} <= described.keys():
        raise CheckpointError(f"{folder / stem}.json: expected the entry 'tensors' with file, sha256 and bytes.")
    path = folder / Path(str(described["file"])).name
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; {stem}.json names it.")
    try:
        size = path.stat().st_size
        if size != described["bytes"]:
            raise CheckpointError(
                f"{path}: expected {described['bytes']} bytes, found {size}; the file is truncated or damaged."
            )
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: could not be read: {error.strerror or error}.") from error
    if digest != described["sha256"]:
        raise CheckpointError(f"{path}: wrong checksum: expected {described['sha256']}, found {digest}.")
    return StoredTensors(document, path)


def _kind(path: Path) -> str:
    return "a file" if path.is_file() else "nothing there"
