"""What the papers count: weights and kept inputs of the converted linear layers, and the FLOPs of their products.

arXiv 2510.09160 and 2505.05086 report memory as the parameters of the converted layers plus what is kept of their
inputs, and computation as the products of these layers. Left out are gradients, optimizer state, everything else that
autograd keeps (norms, activations, attention), the rest of the model, loading and the runtime; micro-batches and
checkpointing have no place in it. The formulas are those of `thintune.costs.linear`, with its legend. Read the result
beside a measured peak, not in place of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from thintune.costs import linear

METHODS = ("dense", "galore", "lora", "asi", "wsi", "wasi", "thin")


@dataclass(frozen=True)
class PaperLayer:
    """One converted linear layer, and the ranks that its method uses."""

    shape: tuple[int, ...]
    """Of the input, (n_1, ..., n_m, I)."""
    out_features: int
    """O."""
    rank: int | None = None
    """K of the weight (`wsi`, `wasi`, `thin`), or of the adapter (`lora`)."""
    activation_ranks: tuple[int, ...] = ()
    """Of the Tucker form, one per mode (`asi`, `wasi`); of the feature mode alone (`thin`)."""

    @property
    def rows(self) -> int:
        """M."""
        return prod(self.shape[:-1])

    @property
    def in_features(self) -> int:
        """I."""
        return self.shape[-1]


@dataclass(frozen=True)
class PaperAccount:
    """Sums over layers, for one forward and backward pass."""

    weight_bytes: int
    activation_bytes: int
    training_flops: int

    @property
    def memory_bytes(self) -> int:
        """Weights and kept inputs."""
        return self.weight_bytes + self.activation_bytes


def paper_account(method: str, layers: Sequence[PaperLayer]) -> PaperAccount:
    """Counts one forward and backward pass of the layers as the papers do.

    Args:
        method: one of `METHODS`; `galore` counts as `dense`, whose weights, inputs and products it has.
        layers: with the ranks that the method needs.

    Raises:
        ValueError: an unknown method, or a layer without a rank that its method needs.
    """
    counts = [_COUNT[method](layer) for layer in layers] if method in _COUNT else None
    if counts is None:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}.")
    weights, activations, flops = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0, 0)
    return PaperAccount(weights, activations, flops)


def _dense(layer: PaperLayer) -> tuple[int, int, int]:
    m, i, o = layer.rows, layer.in_features, layer.out_features
    flops = linear.dense_forward_flops(m, i, o) + linear.dense_input_gradient_flops(m, i, o)
    flops += linear.dense_weight_gradient_flops(m, i, o)
    return linear.dense_parameter_bytes(i, o, bias=False), linear.dense_saved_bytes(m, i), flops


def _lora(layer: PaperLayer) -> tuple[int, int, int]:
    """W, A (r, I) and B (O, r); x and x A.T kept; W takes no gradient."""
    m, i, o, r = layer.rows, layer.in_features, layer.out_features, _rank(layer)
    weights = linear.dense_parameter_bytes(i, o, bias=False) + linear.thin_parameter_bytes(i, o, r, bias=False)
    flops = linear.dense_forward_flops(m, i, o) + linear.dense_input_gradient_flops(m, i, o)
    flops += 3 * linear.thin_forward_flops(m, i, o, r)  # forward, input gradient, gradients of A and B
    return weights, linear.dense_saved_bytes(m, i) + linear.subspace_saved_bytes(m, r), flops


def _asi(layer: PaperLayer) -> tuple[int, int, int]:
    m, i, o, ranks = layer.rows, layer.in_features, layer.out_features, _tucker(layer)
    flops = linear.dense_forward_flops(m, i, o) + linear.dense_input_gradient_flops(m, i, o)
    flops += linear.compression_flops(layer.shape, ranks)
    flops += linear.tucker_dense_weight_gradient_flops(layer.shape, ranks, o)
    return linear.dense_parameter_bytes(i, o, bias=False), linear.tucker_saved_bytes(layer.shape, ranks), flops


def _wsi(layer: PaperLayer) -> tuple[int, int, int]:
    m, i, o, k = layer.rows, layer.in_features, layer.out_features, _rank(layer)
    flops = linear.thin_forward_flops(m, i, o, k) + linear.factor_input_gradient_flops(m, i, o, k)
    flops += linear.factor_weight_gradient_flops(m, i, o, k)
    return linear.thin_parameter_bytes(i, o, k, bias=False), linear.factor_saved_bytes(m, i), flops


def _wasi(layer: PaperLayer) -> tuple[int, int, int]:
    m, i, o, k, ranks = layer.rows, layer.in_features, layer.out_features, _rank(layer), _tucker(layer)
    flops = linear.thin_forward_flops(m, i, o, k) + linear.factor_input_gradient_flops(m, i, o, k)
    flops += linear.compression_flops(layer.shape, ranks)
    flops += linear.factor_tucker_weight_gradient_flops(layer.shape, ranks, o, k)
    return linear.thin_parameter_bytes(i, o, k, bias=False), linear.tucker_saved_bytes(layer.shape, ranks), flops


def _thin(layer: PaperLayer) -> tuple[int, int, int]:
    """Factors, update and basis; x U kept."""
    m, i, o, k, r = layer.rows, layer.in_features, layer.out_features, _rank(layer), _feature(layer)
    weights = linear.thin_parameter_bytes(i, o, k, bias=False) + linear.subspace_state_bytes(i, o, r)
    flops = linear.subspace_forward_flops(m, i, o, k, r) + linear.subspace_input_gradient_flops(m, i, o, k)
    flops += linear.subspace_weight_gradient_flops(m, o, r)
    return weights, linear.subspace_saved_bytes(m, r), flops


def _rank(layer: PaperLayer) -> int:
    if layer.rank is None:
        raise ValueError(f"rank: expected the rank of the weight or adapter, got none for {layer}.")
    return layer.rank


def _tucker(layer: PaperLayer) -> tuple[int, ...]:
    if len(layer.activation_ranks) != len(layer.shape):
        raise ValueError(f"activation_ranks: expected one rank for each mode of {layer.shape}, got {layer}.")
    return layer.activation_ranks


def _feature(layer: PaperLayer) -> int:
    if len(layer.activation_ranks) != 1:
        raise ValueError(f"activation_ranks: expected the rank of the feature mode, got {layer}.")
    return layer.activation_ranks[0]


_COUNT = {
    "dense": _dense,
    "galore": _dense,
    "lora": _lora,
    "asi": _asi,
    "wsi": _wsi,
    "wasi": _wasi,
    "thin": _thin,
}
