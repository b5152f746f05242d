"""Method `svd_lora`: factors by truncation-aware whitening (SVD-LLM, arXiv 2403.07378), frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from thintune.config import ThinConfig
from thintune.convert.calibration import Moments
from thintune.convert.data_aware import Converted
from thintune.convert.selection import put_
from thintune.convert.walk import Walk
from thintune.convert.weights import DenseLayers
from thintune.linalg import whitened_factors
from thintune.nn import ThinLinear


def convert_whitened(
    model: nn.Module, layers: dict[str, nn.Linear], config: ThinConfig, batches: Sequence[Any]
) -> Converted:
    """Finds the moments of all inputs on the dense path, as published, then replaces the layers.

    Args:
        model: holds the layers, in memory.
        layers: to convert; each is let go of once it is thin.
        config: `kept` is the same share for every layer, as published: K = kept O I / (O + I).
        batches: calibration inputs.
    """
    walk = Walk(model, DenseLayers(model, layers, None), batches)
    found = {name: _thin(layers[name], seen, config) for name, seen in walk.moments(list(layers))}
    for name, new in found.items():
        put_(model, layers.pop(name), new)
        yield name, new, new.rank, None


def _thin(layer: nn.Linear, seen: Moments, config: ThinConfig) -> ThinLinear:
    """The frozen layer that takes the place of a dense one; its bias stays."""
    o, i = layer.out_features, layer.in_features
    rank = config.rank if config.kept is None else max(1, int(config.kept * o * i / (o + i)))
    share = config.explained_variance
    left, right = whitened_factors(layer.weight, seen.second, rank=rank, explained_variance=share)
    thin = ThinLinear(i, o, left.shape[1], layer.bias is not None, device="meta", dtype=layer.weight.dtype)
    thin.set_(left, right, None if layer.bias is None else layer.bias.detach())
    return thin.requires_grad_(False)
