"""Checkpoints of models: a folder with `checkpoint.json` and one safetensors file.

What only training needs (bases, zero updates) is left out: a thin checkpoint is as small as the thin model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thintune.convert.weights import fill_
from thintune.errors import CheckpointError, nearest
from thintune.io.tensors import StoredTensors, read_tensors, write_tensors
from thintune.nn import CompressedLinear, ThinLinear

FORMAT = "thintune-checkpoint"
VERSION = 1
_STEM = "checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been checked."""

    stored: StoredTensors

    @property
    def thin_layers(self) -> dict[str, dict[str, Any]]:
        """in_features, out_features, rank and bias of each thin layer by name."""
        return self.stored.document["thin_layers"]

    @property
    def info(self) -> dict[str, Any]:
        """What the writer said about the run."""
        return self.stored.document["info"]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor file."""
        return int(self.stored.document["tensors"]["bytes"])


def inference_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model without what only training needs."""
    dropped: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ThinLinear | CompressedLinear):
            dropped |= {f"{name}.{n}" if name else n for n in module.training_only()}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in dropped}


def save_checkpoint(model: nn.Module, folder: str | Path, info: Mapping[str, Any] | None = None) -> Checkpoint:
    """Writes what inference needs of a model; an older checkpoint in the folder is replaced at the very end.

    Args:
        model: thin or dense.
        folder: made if need be.
        info: JSON values to keep with it.

    Raises:
        OutputError: the folder cannot be written to, or the disk is full; an older checkpoint is as it was.
    """
    layers = {
        name: {
            "in_features": module.in_features,
            "out_features": module.out_features,
            "rank": module.rank,
            "bias": module.bias is not None,
        }
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, ThinLinear)
    }
    document = {"format": FORMAT, "version": VERSION, "thin_layers": layers, "info": dict(info or {})}
    write_tensors(Path(folder), _STEM, inference_tensors(model), document)
    return read_checkpoint(folder)


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Reads and checks a checkpoint's files, without its tensors.

    Raises:
        CheckpointError: missing, truncated, damaged, or of another format.
    """
    stored = read_tensors(Path(folder), _STEM)
    found = stored.document.get("format"), stored.document.get("version")
    if found != (FORMAT, VERSION):
        raise CheckpointError(f"{folder}: expected format {FORMAT!r} version {VERSION}, got {found[0]!r} {found[1]!r}.")
    for part in ("thin_layers", "info"):
        if not isinstance(stored.document.get(part), dict):
            raise CheckpointError(f"{folder}: expected the entry {part!r} with a JSON object.")
    for name, spec in stored.document["thin_layers"].items():
        if not _is_layer(spec):
            raise CheckpointError(
                f"{folder}: {name}: expected in_features, out_features, rank and bias of a layer, got {spec}."
            )
    return Checkpoint(stored)


def find_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint folder, or the one inside a run's folder."""
    inner = path / "checkpoint"
    return read_checkpoint(inner if inner.is_dir() else path)


def _is_layer(spec: Any) -> bool:
    if not isinstance(spec, dict) or spec.keys() != {"in_features", "out_features", "rank", "bias"}:
        return False
    o, i, k = spec["out_features"], spec["in_features"], spec["rank"]
    return all(type(n) is int for n in (o, i, k)) and 1 <= k <= min(o, i) and type(spec["bias"]) is bool


def load_checkpoint_(model: nn.Module, folder: str | Path | Checkpoint, *, leave: Collection[str] = ()) -> nn.Module:
    """Loads a checkpoint into a model of the same architecture, dense layers becoming thin where it says so.

    The model may live on the meta device: its tensors are replaced, not copied into, so no dense weight is ever made.
    They are read module by module, each straight into its own memory: the peak is that of the loaded model.

    Args:
        model: built as the one that was saved, before its conversion.
        folder: of the checkpoint, or one already read.
        leave: names of modules that stay as the model has them, whatever the file says of them.

    Returns:
        The same model.

    Raises:
        CheckpointError: damaged, or of another architecture; the model is as it was.
    """
    checkpoint = folder if isinstance(folder, Checkpoint) else read_checkpoint(folder)
    stored = checkpoint.stored.open()
    layers = {name: spec for name, spec in checkpoint.thin_layers.items() if not _lies_in(name, leave)}
    shapes = {name: shape for name, shape in stored.shapes().items() if not _lies_in(name, leave)}
    _check(model, checkpoint, layers, shapes, leave)
    for name, spec in layers.items():
        parent, _, child = name.rpartition(".")
        thin = ThinLinear(**spec, device="meta", dtype=stored[f"{name}.left"].dtype)
        thin.train(model.get_submodule(name).training)
        setattr(model.get_submodule(parent), child, thin)
    fill_(model, {name: partial(stored.read, name) for name in shapes})
    return model


def _lies_in(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _check(
    model: nn.Module,
    checkpoint: Checkpoint,
    layers: Mapping[str, dict[str, Any]],
    shapes: Mapping[str, tuple[int, ...]],
    leave: Collection[str],
) -> None:
    """Raises with every mismatch, before any tensor is read."""
    modules = dict(model.named_modules(remove_duplicate=False))
    expected = {n: tuple(t.shape) for n, t in inference_tensors(model).items() if not _lies_in(n, leave)}
    problems = []
    for name, spec in layers.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear | ThinLinear):
            problems.append(f"{name}: no linear layer of that name{nearest(name, modules)}")
            continue
        o, i, k = (spec[key] for key in ("out_features", "in_features", "rank"))
        if (module.out_features, module.in_features) != (o, i):
            problems.append(f"{name}: {o} x {i} in the file, {module.out_features} x {module.in_features} in the model")
        if (module.bias is not None) != spec["bias"]:
            problems.append(f"{name}: {'a' if spec['bias'] else 'no'} bias in the file, not so in the model")
        for part in ("weight", "left", "right"):
            expected.pop(f"{name}.{part}", None)
        expected |= {f"{name}.left": (o, k), f"{name}.right": (k, i)}
    check_shapes(str(checkpoint.stored.path.parent), expected, shapes, problems)


def check_shapes(
    where: str,
    expected: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    problems: Sequence[str] = (),
) -> None:
    """Compares names and shapes of a file's tensors with those a model expects.

    Args:
        where: the file, for the message.
        expected: shape by name.
        shapes: of the file's tensors, by name.
        problems: found before, to be reported first.

    Raises:
        CheckpointError: naming the first three problems and counting the rest.
    """
    found = list(problems)
    for name in sorted(expected.keys() | shapes.keys()):
        ours, theirs = expected.get(name), shapes.get(name)
        if ours != theirs:
            described = ["missing" if shape is None else str(shape) for shape in (theirs, ours)]
            found.append(f"{name}: {described[0]} in the file, {described[1]} in the model")
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise CheckpointError(f"{where}: made for another architecture: {'; '.join(found[:3])}{more}.")


def meta_tensors(model: nn.Module) -> list[str]:
    """Names of parameters and buffers that have no storage yet."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in named if tensor.device == torch.device("meta")]
