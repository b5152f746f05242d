"""Ranks of the weights: one explained variance, one share of the weights, or one number for all layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from thintune.config import ThinConfig
from thintune.errors import ConversionError
from thintune.linalg import rank_for_explained_variance


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
        spectra: gives the variances of each layer, descending; called only where ranks depend on them.
        config: exactly one of rank, kept and explained_variance is set.
        cap: never go above the break-even rank, and round up by `whole_vectors`.

    Returns:
        Rank by name. Under `kept` all layers share the one explained variance that brings the sum of their factors
        closest to the asked share of their weights from below.

    Raises:
        ConversionError: a rank above a layer's limit, or a share too small for rank 1.
    """
    if config.rank is not None:
        check_rank(layers, config.rank)
        return dict.fromkeys(layers, config.rank)
    limits = {n: break_even_rank(m) if cap else min(m.out_features, m.in_features) for n, m in layers.items()}
    variances = spectra()

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
