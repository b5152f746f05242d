"""How the subspaces of a model's layers move while it trains (the question of arXiv 2510.09160, figures 3 and 4)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thintune.io import StoredTensors, read_document, read_tensors, write_tensors, write_text
from thintune.linalg import principal_angles
from thintune.nn import CompressedLinear, FactorLinear, SubspaceLinear, ThinLinear

EXPLAINED = (0.5, 0.8, 0.9, 0.99)
"""Shares of the variance for which the rank of every weight is noted."""
DOCUMENT = "subspaces.json"


class SubspaceTracker:
    """Notes ranks and principal angles of every layer, at the start and after each epoch, in `FOLDER/subspaces.json`.

    The bases of the start and of the epoch before lie in files, so that tracking adds one layer's bases to the memory
    of a run, not the model's. A layer has the basis `weight` (columns of left) and those of its kept input: `input`,
    its features, and `mode 1`, `mode 2` of a Tucker form.

    Args:
        model: with thin or compressed layers.
        folder: of the run.
        epochs: completed ones of a run that is taken up, whose document is continued; None for a run that begins.
    """

    def __init__(self, model: nn.Module, folder: Path, epochs: int | None = None) -> None:
        self._model, self._folder, self._store = model, folder, folder / "subspaces"
        self._document: dict[str, Any] = {"explained_variances": list(EXPLAINED), "epochs": [], "layers": {}}
        if epochs is not None and (folder / DOCUMENT).is_file() and self._stored("start") is not None:
            self._continue(epochs)
        else:
            self._keep("start")
            self.observe(0)

    def _continue(self, epochs: int) -> None:
        self._document = read_document(self._folder / DOCUMENT)
        count = sum(number <= epochs for number in self._document["epochs"])
        del self._document["epochs"][count:]
        for layer in self._document["layers"].values():
            for basis in layer.values():
                for values in basis.values():
                    if isinstance(values, list):
                        del values[count:]

    @torch.no_grad()
    def observe(self, epoch: int) -> None:
        """Compares every basis with what it was at the start and when last observed."""
        start, last = self._stored("start"), self._stored("last")
        assert start is not None
        for layer, basis, tensor in _bases(self._model):
            found = self._document["layers"].setdefault(layer, {}).setdefault(basis, _empty(tensor))
            for name, stored in (("from_start", start), ("from_last", last or start)):
                before = stored.open().read(f"{layer} {basis}")
                degrees = principal_angles(before, tensor.float()) * (180 / math.pi)
                found[f"mean_angle_{name}_deg"].append(_rounded(degrees.square().mean().sqrt()))
                found[f"largest_angle_{name}_deg"].append(_rounded(degrees.max()))
        for layer, module in _thin_layers(self._model):
            found = self._document["layers"][layer]["weight"]
            found.setdefault("explained_ranks", []).append(_explained_ranks(module.right))
        self._document["epochs"].append(epoch)
        self._keep("last")
        write_text(self._folder / DOCUMENT, json.dumps(self._document) + "\n")

    def _stored(self, stem: str) -> StoredTensors | None:
        return read_tensors(self._store, stem) if (self._store / f"{stem}.json").is_file() else None

    def _keep(self, stem: str) -> None:
        write_tensors(self._store, stem, {f"{layer} {name}": b.float() for layer, name, b in _bases(self._model)}, {})


def _empty(basis: Tensor) -> dict[str, Any]:
    angles = (f"{which}_angle_{since}_deg" for which in ("mean", "largest") for since in ("from_start", "from_last"))
    return {"rank": basis.shape[1], "features": basis.shape[0], **{name: [] for name in angles}}


def _thin_layers(model: nn.Module) -> Iterator[tuple[str, ThinLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, SubspaceLinear | FactorLinear):
            yield name, module


def _bases(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Layer, name and values (n, r) of every orthonormal basis."""
    for name, module in _thin_layers(model):
        yield name, "weight", module.left.detach()
        if isinstance(module, SubspaceLinear):
            yield name, "input", module.basis
    for name, module in model.named_modules():
        if isinstance(module, FactorLinear | CompressedLinear) and module.compressor is not None:
            modes = [(number, basis) for number, (_, basis) in enumerate(module.compressor.named_buffers(), 1)]
            for number, basis in modes:
                if bool(basis.any()):
                    yield name, "input" if number == len(modes) else f"mode {number}", basis


def _explained_ranks(right: Tensor) -> list[int]:
    """Of left @ right, whose singular values are those of right, since left has orthonormal columns."""
    energy = torch.linalg.svdvals(right.detach().float()).double().square().cumsum(0)
    return [int((energy < share * energy[-1]).sum()) + 1 for share in EXPLAINED]


def _rounded(value: Tensor) -> float:
    return round(float(value), 3)
