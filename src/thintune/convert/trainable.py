"""Thin layers as they are shipped, made ready to train on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thintune.config import ThinConfig
from thintune.convert.calibration import checked_batches, observe
from thintune.convert.lean import make_blocks_lean_
from thintune.convert.report import ConversionReport, LayerReport
from thintune.convert.selection import freeze_as_, replace_, trains
from thintune.errors import ConversionError
from thintune.linalg import leading_directions, orthonormalize
from thintune.measure import release_free_memory
from thintune.nn import SubspaceLinear, ThinLinear

PASSES = 2
"""Passes over the calibration inputs, each a subspace iteration of the activation bases."""
_OVERSAMPLING = 1.5


@torch.no_grad()
def make_trainable_(
    model: nn.Module, config: ThinConfig | None = None, *, calibration: Iterable[Any], seed: int = 0
) -> ConversionReport:
    """Lets a model of thin layers, as `load_checkpoint_` gives it back, train by method `thin`, in place.

    Every `ThinLinear` becomes a `SubspaceLinear` on the same memory. Its activation basis comes from a randomised
    range finder on the thin model itself: U starts as random orthonormal columns, somewhat more than asked for, and
    moves by U <- orth(sum X.T (X U)); the last sum gives the leading directions. Nothing larger than that is held for
    a layer beside one batch's forward pass.

    Args:
        model: holds the thin layers; dense layers stay dense.
        config: activation_rank, a narrower factor_dtype, and which blocks shall be lean; `ThinConfig()` by default.
        calibration: batches of inputs, unlabelled, iterated over once a pass.
        seed: of the random start; no other random number is drawn.

    Returns:
        Every linear layer, with the rank that the checkpoint gave it.

    Raises:
        ConversionError: no thin layer in the model, or no calibration.
    """
    config = config or ThinConfig()
    shipped = {name: module for name, module in model.named_modules() if type(module) is ThinLinear}
    if not shipped:
        raise ConversionError("the model has no thin layer to train on; convert_ makes dense layers thin.")
    batches = checked_batches(calibration)
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, SubspaceLinear] = {}
    starts: dict[str, Tensor] = {}
    training = {name: trains(layer) for name, layer in shipped.items()}
    for name in training:
        layer = shipped.pop(name)
        layers[name] = _trainable(layer, config.activation_rank)
        if config.factor_dtype == "bfloat16":
            layers[name].store_(torch.bfloat16)
        width = min(layer.in_features, round(_OVERSAMPLING * layers[name].basis.shape[1]) + 2)
        random = torch.randn(layer.in_features, width, generator=generator)
        starts[name] = orthonormalize(random).to(layer.left.device, layers[name].update.dtype)
        replace_(model, layer, layers[name])
        del layer
    for last in (False,) * (PASSES - 1) + (True,):
        for name, image in _images(model, layers, starts, batches).items():
            if last:
                rank = layers[name].basis.shape[1]
                layers[name].start_(leading_directions(starts.pop(name), image, rank))
            else:
                starts[name] = orthonormalize(image)
    for name, start in starts.items():  # of layers that were never called
        layers[name].start_(start[:, : layers[name].basis.shape[1]].contiguous())
    for name, layer in layers.items():
        freeze_as_(layer, *training[name])
    return ConversionReport("thin", _describe(model), make_blocks_lean_(model, config))


def _images(
    model: nn.Module, layers: Mapping[str, nn.Module], starts: Mapping[str, Tensor], batches: Sequence[Any]
) -> dict[str, Tensor]:
    """Sum of X.T (X U) over all batches (I, m), by layer."""
    found = {name: torch.zeros_like(start) for name, start in starts.items()}  # made before the heap fills
    called: set[str] = set()

    def visit(name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        found[name].addmm_(rows.T, rows @ starts[name])
        called.add(name)

    observe(model, dict(layers), batches, visit)
    release_free_memory()
    return {name: found[name] for name in found if name in called}


def _trainable(layer: ThinLinear, activation_rank: int) -> SubspaceLinear:
    """A training layer on the memory of a shipped one; its basis has yet to be found."""
    new = SubspaceLinear(
        layer.in_features,
        layer.out_features,
        layer.rank,
        layer.bias is not None,
        activation_rank=activation_rank,
        device="meta",
        dtype=_computing_type(layer),
    )
    new.set_(layer.left.detach(), layer.right.detach(), None if layer.bias is None else layer.bias.detach())
    return new


def _computing_type(layer: ThinLinear) -> torch.dtype:
    """The type of the layer's inputs; its factors may be stored in a narrower one."""
    if layer.bias is not None:
        return layer.bias.dtype
    return torch.promote_types(layer.left.dtype, torch.float32)


def _describe(model: nn.Module) -> list[LayerReport]:
    found = []
    for name, module in model.named_modules():
        if isinstance(module, SubspaceLinear):
            size = module.left.element_size()
            before, after = module.dense_elements * module.update.element_size(), module.kept_elements * size
            ranks = (module.basis.shape[1],)
            found.append(LayerReport(name, module.out_features, module.in_features, module.rank, ranks, before, after))
        elif isinstance(module, nn.Linear):
            size = module.weight.nbytes
            found.append(
                LayerReport(name, module.out_features, module.in_features, None, None, size, size, "dense in the file")
            )
    return found
