"""Ranks of the weights: one explained variance, one share of the weights, or one number for all layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from thintune.config import ThinConfig
from thintune.errors import ConversionError
from thintune.linalg import rank_for_explained_variance
from thintune.planning.knapsack import Option, choose

_MAX_POINTS = 8_000
"""Partial plans of ranks held at once; with more of them, costs are rounded up by a little."""


def break_even_rank(layer: nn.Linear) -> int:
    """Largest rank at which two factors are no larger than the weight, O I / (O + I)."""
    o, i = layer.out_features, layer.in_features
    return max(1, o * i // (o + i))


def check_rank(layers: Mapping[str, nn.Linear], rank: int) -> None:
    """Raises ConversionError naming every layer that cannot have this rank."""
    wrong = [
        f"{name}: rank {rank} exceeds min(in_features={layer.in_features}, out_features={layer.out_features}); "
        f"use rank <= {min(layer.in_features, layer.out_features)} or explained_variance."
        for name, layer in layers.items()
        if rank > min(layer.in_features, layer.out_features)
    ]
    if wrong:
        raise ConversionError(" ".join(wrong))


def whole_vectors(rank: int, limit: int) -> int:
    """The next rank up that fills the vectors of a processor: a multiple of 16, of 4 below 64, any below 16.

    Products with rows of 245 values take no less time than those with 256.

    Args:
        rank: wanted.
        limit: never exceeded.
    """
    step = 16 if rank >= 64 else 4 if rank >= 16 else 1
    return min(limit, -(-rank // step) * step)


def choose_ranks(
    layers: Mapping[str, nn.Linear], spectra: Callable[[], dict[str, Tensor]], config: ThinConfig, *, cap: bool
) -> dict[str, int]:
    """Rank of each layer.

    Args:
        layers: by name.
        spectra: gives the variances of each layer, or its losses, descending; called only where ranks depend on them.
        config: exactly one of rank, kept and explained_variance is set.
        cap: never go above the break-even rank, and round up by `whole_vectors`.

    Returns:
        Rank by name. Under `kept` all layers share the one explained variance that brings the sum of their factors
        closest to the asked share of their weights from below, or ranks are those of the least summed loss within it.

    Raises:
        ConversionError: a rank above a layer's limit, or a share too small for rank 1.
    """
    if config.rank is not None:
        check_rank(layers, config.rank)
        return dict.fromkeys(layers, config.rank)
    limits = {n: break_even_rank(m) if cap else min(m.out_features, m.in_features) for n, m in layers.items()}
    variances = spectra()
    if cap and config.kept is not None and config.rank_allocation == "sensitivity":
        return _least_loss({name: layers[name] for name in variances}, variances, config.kept)

    def rank_at(name: str, share: float) -> int:
        found = rank_for_explained_variance(variances[name], share)
        return whole_vectors(found, limits[name]) if cap else min(limits[name], found)

    def at(share: float) -> dict[str, int]:
        return {name: rank_at(name, share) for name in variances}

    if config.explained_variance is not None:
        return at(config.explained_variance)
    assert config.kept is not None
    return _at_kept({name: layers[name] for name in variances}, at, config.kept)


def _at_kept(
    layers: Mapping[str, nn.Linear], ranks_at: Callable[[float], dict[str, int]], kept: float
) -> dict[str, int]:
    """Bisects the common unexplained share on a logarithmic scale, down to where ranks stop changing."""
    budget = kept * sum(layer.in_features * layer.out_features for layer in layers.values())

    def at(exponent: float) -> dict[str, int]:
        return ranks_at(max(1e-12, 1.0 - 10.0**exponent))

    def cost(ranks: Mapping[str, int]) -> int:
        return sum(k * (layers[n].in_features + layers[n].out_features) for n, k in ranks.items())

    low, high = 0.0, -11.0  # exponents: fewest ranks at low, most at high
    if cost(at(low)) > budget:
        raise ConversionError(
            f"kept={kept}: rank 1 everywhere keeps {cost(at(low)) / budget * kept:.4f} of the weights; ask for more."
        )
    if cost(at(high)) <= budget:
        return at(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle)) <= budget else (low, middle)
    return at(low)


def _least_loss(layers: Mapping[str, nn.Linear], spectra: Mapping[str, Tensor], kept: float) -> dict[str, int]:
    """Ranks of the least summed loss under a share of the weights, by the dynamic programme of `planning.knapsack`.

    Offered are multiples of 16; of less, where that would leave little choice.

    Args:
        layers: by name.
        spectra: (min(O, I),) by name, losses that may be summed over the layers.
        kept: share of all weights.
    """
    budget = int(kept * sum(layers[name].in_features * layers[name].out_features for name in spectra))
    sizes = {name: layers[name].in_features + layers[name].out_features for name in spectra}
    limits = {name: break_even_rank(layers[name]) for name in spectra}

    def offer(step: int) -> dict[str, list[int]]:
        return {n: sorted({whole_vectors(k, limits[n]) for k in range(step, limits[n] + step, step)}) for n in spectra}

    step = 16
    while step > 1 and (
        2 * sum(offer(step)[n][0] * sizes[n] for n in spectra) > budget or min(limits.values(), default=0) < 8 * step
    ):
        step //= 2
    ranks = offer(step)
    least = sum(ranks[n][0] * sizes[n] for n in spectra)
    if least > budget:
        raise ConversionError(
            f"kept={kept}: rank 1 everywhere keeps {least / budget * kept:.4f} of the weights; ask for more."
        )
    options = []
    for name, spectrum in spectra.items():
        beyond = torch.cat([spectrum.flip(0).cumsum(0).flip(0), spectrum.new_zeros(1)]).tolist()
        options.append([Option(rank * sizes[name], max(0.0, beyond[rank])) for rank in ranks[name]])
    chosen = choose(options, budget, max_points=_MAX_POINTS)
    return {name: ranks[name][index] for name, index in zip(spectra, chosen, strict=True)}
