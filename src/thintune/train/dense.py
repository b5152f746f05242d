"""Dense weights in a safetensors file, under the names of a timm model, one at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thintune.errors import CheckpointError
from thintune.io.checkpoint import check_shapes
from thintune.io.tensor_file import TensorFile


class DenseWeights:
    """What a file holds of a model, renamed and resampled as timm does it.

    timm's filter sees matrices without their values, unless it needs them: whatever it passes on as it is stays in
    the file until it is read.

    Args:
        path: of a safetensors file.
        model: of the architecture the file was made for; may be on the meta device.
        head: name of its head, which may be missing or of another shape.
        keep_head: take over a head of the model's shape.

    Raises:
        CheckpointError: missing, damaged, or of another architecture.
    """

    def __init__(self, path: Path, model: nn.Module, head: str, *, keep_head: bool = False) -> None:
        where = f"model.checkpoint: {path}"
        if not path.is_file():
            found = "a folder" if path.is_dir() else "nothing of that name"
            raise CheckpointError(f"{where}: expected a safetensors file, found {found}.")
        try:
            self._file = TensorFile(path)
        except CheckpointError as error:
            raise CheckpointError(f"model.checkpoint: {error}") from error
        own = model.state_dict()
        self._dtypes = {name: tensor.dtype for name, tensor in own.items()}
        self._state = self._filtered(model)
        shapes = {name: tuple(value.shape) for name, value in self._state.items()}
        expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
        heads = [name for name in shapes.keys() | expected.keys() if name.rpartition(".")[0] == head]
        if not keep_head or any(shapes.get(name) != expected.get(name) for name in heads):
            for name in heads:
                self._state.pop(name, None)
                shapes.pop(name, None)
        for name in heads:
            expected.pop(name, None)
        self.names = list(shapes)
        """Tensors of the model that the file has values for; the whole head or nothing of it."""
        check_shapes(where, expected, {n: s for n, s in shapes.items() if n not in heads})

    def load(self, name: str) -> Tensor:
        """Reads one tensor of the model, in the model's own precision."""
        found = self._state[name]
        value = self._file.read(self._lazy[id(found)]) if found.is_meta else found
        return value.to(self._dtypes[name]) if value.is_floating_point() else value

    def readers(self) -> dict[str, Callable[[], Tensor]]:
        """What reads each tensor, by name."""
        return {name: partial(self.load, name) for name in self.names}

    @property
    def streams(self) -> bool:
        """Whether matrices are still in the file."""
        return bool(self._lazy)

    def _filtered(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's names -> values, or a place holder for what stays in the file."""
        resample: Any = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        state = {n: self._placeholder(n) if self._is_matrix(n) else self._file.read(n) for n in self._file}
        self._lazy = {id(value): name for name, value in state.items() if value.is_meta}
        if resample is None:
            return state
        try:
            found = dict(resample(dict(state), model))
            if all(id(value) in self._lazy for value in found.values() if value.is_meta):
                return found
        except (RuntimeError, ValueError):  # it looked at a value
            pass
        self._lazy = {}
        return dict(resample({name: self._file.read(name) for name in self._file}, model))

    def _is_matrix(self, name: str) -> bool:
        return name.endswith(".weight") and len(self._file[name].shape) == 2

    def _placeholder(self, name: str) -> Tensor:
        return torch.empty(self._file[name].shape, dtype=self._file[name].dtype, device="meta")
