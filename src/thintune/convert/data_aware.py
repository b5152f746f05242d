"""Method `thin`: data-aware factors, found block by block on the already converted path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from thintune.config import ThinConfig
from thintune.convert.calibration import Moments, rows_seen
from thintune.convert.ranks import choose_ranks
from thintune.convert.reconstruction import reconstruct_
from thintune.convert.selection import put_
from thintune.convert.sensitivity import output_worths
from thintune.convert.walk import Walk
from thintune.convert.weights import DenseLayers
from thintune.errors import ConversionError
from thintune.linalg import (
    data_aware_factors,
    input_basis,
    output_spectrum,
    weighted_factors,
    weighted_spectrum,
    worth_root,
)
from thintune.nn import SubspaceLinear

UNSEEN = 1e-6
"""Variance given to every input direction, as a share of the mean variance.

Directions that the calibration inputs never take (a layer norm leaves one, few inputs leave many) get a trace of it, so
that a rank which has room for them keeps what the weight makes of them.
"""

Converted = Iterable[tuple[str, nn.Module, int | None, tuple[int, ...] | None]]
"""Name, new layer, rank of the weight and ranks of the kept input."""


def convert_data_aware(model: nn.Module, dense: DenseLayers, config: ThinConfig, batches: Sequence[Any]) -> Converted:
    """Sweep 1 finds the spectra on the dense path and from them the ranks; sweep 2 converts block by block.

    Args:
        model: holds the layers.
        dense: to convert; each is let go of once it is thin.
        config: ranks.
        batches: calibration inputs.

    Raises:
        ConversionError: before anything is changed, for ranks that cannot be had.
    """
    walk = Walk(model, dense, batches)
    if config.reconstruction_steps and not walk.chains:
        raise ConversionError(
            "thin.reconstruction_steps: expected blocks that run one after another, each on what the one before "
            f"returned, found none; got {config.reconstruction_steps}, set it to 0."
        )
    roots = _worth_roots(model, dense, config, batches, walk)
    rows: dict[str, int] = {}

    def spectra() -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, seen in walk.moments(list(dense.layers)):
            rows[name] = seen.count
            layer = dense.layers[name]
            covariance, ridge = _spread_(seen, seen.outer.div_(seen.count), layer.bias is not None)
            with dense.resident([name]):
                found[name] = _spectrum(layer.weight, covariance, ridge, roots.get(name), config)
            del layer, seen, covariance  # the next pass needs the room
        return found

    ranks = choose_ranks(dense.layers, spectra, config, cap=config.rank is None)
    if config.rank is not None:
        with dense.resident():
            rows = rows_seen(model, dense.layers, batches)
    _check_rows(rows, dense.layers, ranks)
    amend_ = partial(reconstruct_, steps=config.reconstruction_steps) if config.reconstruction_steps else None
    for name, seen in walk.moments([name for name in dense.layers if name in rows], amend_):
        with dense.resident([name]):
            layer = dense.layers[name]
            new = _thin(layer, seen, ranks[name], config, roots.get(name))
            del seen
            put_(model, layer, new)
            del layer
        del dense.layers[name]
        yield name, new, ranks[name], (new.basis.shape[1],)
        del new
    dense.keep_rest_()


def _worth_roots(
    model: nn.Module, dense: DenseLayers, config: ThinConfig, batches: Sequence[Any], walk: Walk
) -> dict[str, Tensor]:
    """By layer the root of what its output features are worth, where the configuration asks for it."""
    allocated = config.rank_allocation == "sensitivity" and config.kept is not None
    if not allocated and config.output_weighting == "none":
        return {}
    worths = output_worths(model, dense, batches, walk.chains)
    return {name: worth_root(worth) for name, worth in worths.items()}


def _spectrum(weight: Tensor, covariance: Tensor, ridge: float, root: Tensor | None, config: ThinConfig) -> Tensor:
    """What each direction of the output explains: of its variance, or of what the features lose with it."""
    if root is None or config.rank_allocation == "variance":
        return output_spectrum(weight, covariance, ridge)
    if config.output_weighting == "none":
        return output_spectrum(weight, covariance, ridge) * root.square().mean()
    return weighted_spectrum(weight, covariance, root, ridge)


def _thin(layer: nn.Linear, seen: Moments, rank: int, config: ThinConfig, root: Tensor | None) -> SubspaceLinear:
    """The layer that takes the place of a dense one; uses up the moments."""
    second = seen.outer.div_(seen.count)
    basis = input_basis(second, min(config.activation_rank, layer.in_features))
    covariance, ridge = _spread_(seen, second, layer.bias is not None)
    if root is None or config.output_weighting == "none":
        left, right, shift = data_aware_factors(layer.weight, covariance, seen.mean, rank, ridge)
    else:
        left, right, shift = weighted_factors(layer.weight, covariance, seen.mean, rank, root, ridge)
    thin = SubspaceLinear(
        layer.in_features,
        layer.out_features,
        rank,
        layer.bias is not None,
        activation_rank=config.activation_rank,
        device="meta",
        dtype=layer.weight.dtype,
    )
    thin.set_(left, right, None if layer.bias is None else layer.bias + shift)
    thin.start_(basis)
    if config.factor_dtype == "bfloat16":
        thin.store_(torch.bfloat16)
    return thin


def _spread_(seen: Moments, second: Tensor, centred: bool) -> tuple[Tensor, float]:
    """What the factors must explain, in the memory of the second moment, and what is to be added to its diagonal.

    The covariance, or the second moment itself where no bias can take up the mean.
    """
    if centred:
        second.addr_(seen.mean, seen.mean, alpha=-1)
    return second, UNSEEN * float(second.diagonal().double().mean())


def _check_rows(rows: Mapping[str, int], layers: Mapping[str, nn.Linear], ranks: Mapping[str, int]) -> None:
    """Raises ConversionError naming the truncated layers whose calibration rows cannot determine as many directions."""
    limits = {n: min(layers[n].out_features, layers[n].in_features) for n in rows}
    short = [f"{n}: {rows[n]} rows for rank {ranks[n]}" for n in rows if rows[n] < ranks[n] < limits[n]]
    if short:
        more = f" (and {len(short) - 3} more)" if len(short) > 3 else ""
        raise ConversionError(
            f"calibration: expected at least as many rows (images x tokens) as a layer's rank, got "
            f"{'; '.join(short[:3])}{more}; give more calibration images or ask for a smaller rank."
        )
