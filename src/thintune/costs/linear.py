"""Bytes and FLOPs of one linear layer, dense or thin.

Legend: M rows (all leading axes of the input, flattened), I input features, O output features, K rank of the weight,
r rank of the input's feature mode, shape (n_1, ..., n_m, I) of the input and ranks (r_1, ..., r_m, r) of its Tucker
form, the feature mode last.

1 multiply-add = 2 FLOPs. Only products of matrices count: bias, elementwise work and factorisations (QR, Cholesky,
triangular and K x K solves) are left out, as `thintune.measure.count_flops` leaves them out. Every result is an exact
integer.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

FLOAT_BYTES = 4
"""Bytes of a float32 value, the default of every `element_bytes`."""


# Bytes kept from the forward pass for the backward pass.


def dense_saved_bytes(rows: int, in_features: int, element_bytes: int = FLOAT_BYTES) -> int:
    """M I values: a dense layer keeps its input whole."""
    return rows * in_features * element_bytes


def factor_saved_bytes(rows: int, in_features: int, element_bytes: int = FLOAT_BYTES) -> int:
    """M I values: a layer that trains both factors (`wsi`) keeps its input whole."""
    return rows * in_features * element_bytes


def subspace_saved_bytes(rows: int, activation_rank: int, element_bytes: int = FLOAT_BYTES) -> int:
    """M r values: the input in the coordinates of its basis (`thin`)."""
    return rows * activation_rank * element_bytes


def tucker_saved_bytes(shape: Sequence[int], ranks: Sequence[int], element_bytes: int = FLOAT_BYTES) -> int:
    """Core and factors of a Tucker form (`asi`, `wasi`): r_1 ... r_m r + sum of n_i r_i, the feature mode included.

    Args:
        shape: of the input, (n_1, ..., n_m, I).
        ranks: one per mode, none above what the mode can have.
        element_bytes: of one value.
    """
    return (prod(ranks) + sum(n * r for n, r in zip(shape, ranks, strict=True))) * element_bytes


# Bytes of the parameters.


def dense_parameter_bytes(
    in_features: int, out_features: int, bias: bool = True, element_bytes: int = FLOAT_BYTES
) -> int:
    """O I values, and O of a bias."""
    return (out_features * in_features + out_features * bias) * element_bytes


def thin_parameter_bytes(
    in_features: int, out_features: int, rank: int, bias: bool = True, element_bytes: int = FLOAT_BYTES
) -> int:
    """K (O + I) values, and O of a bias: what a thin layer is outside training."""
    return (rank * (out_features + in_features) + out_features * bias) * element_bytes


def subspace_state_bytes(
    in_features: int, out_features: int, activation_rank: int, element_bytes: int = FLOAT_BYTES
) -> int:
    """R (O + I) values: update and basis, which a subspace layer has besides its factors while it trains."""
    return activation_rank * (out_features + in_features) * element_bytes


# FLOPs of a dense layer.


def dense_forward_flops(rows: int, in_features: int, out_features: int) -> int:
    """2 M I O: x W.T."""
    return 2 * rows * in_features * out_features


def dense_input_gradient_flops(rows: int, in_features: int, out_features: int) -> int:
    """2 M I O: G W."""
    return 2 * rows * in_features * out_features


def dense_weight_gradient_flops(rows: int, in_features: int, out_features: int) -> int:
    """2 M I O: G.T x."""
    return 2 * rows * in_features * out_features


# FLOPs of thin layers.


def thin_forward_flops(rows: int, in_features: int, out_features: int, rank: int) -> int:
    """2 M K (I + O): (x R.T) L.T; inference, and the training forward pass of `wsi`."""
    return 2 * rows * rank * (in_features + out_features)


def subspace_forward_flops(rows: int, in_features: int, out_features: int, rank: int, activation_rank: int) -> int:
    """2 M K (I + O) + 2 M I r: the thin product, and the projection of the input that is kept."""
    return thin_forward_flops(rows, in_features, out_features, rank) + 2 * rows * in_features * activation_rank


def subspace_input_gradient_flops(rows: int, in_features: int, out_features: int, rank: int) -> int:
    """2 M K (I + O): (G L) R."""
    return 2 * rows * rank * (in_features + out_features)


def subspace_weight_gradient_flops(rows: int, out_features: int, activation_rank: int) -> int:
    """2 M O r: G.T (x U), the gradient of the update."""
    return 2 * rows * out_features * activation_rank


def factor_input_gradient_flops(rows: int, in_features: int, out_features: int, rank: int) -> int:
    """2 M K (I + O): (G L) R."""
    return 2 * rows * rank * (in_features + out_features)


def factor_weight_gradient_flops(rows: int, in_features: int, out_features: int, rank: int) -> int:
    """2 M K (2 I + O): G.T (x R.T) and (G L).T x from a whole input, with G L taken over from the input gradient."""
    return 2 * rows * rank * (2 * in_features + out_features)


# FLOPs of layers that keep their input as a Tucker form.


def tucker_contraction_flops(shape: Sequence[int], ranks: Sequence[int], out_features: int) -> int:
    """A (O, r) with D = A U.T, in the order that `thintune.ops.tucker_weight_gradient` takes.

    Either G is contracted with the leading factors, the mode that shrinks most first, and then with the core; or the
    leading modes of the core are multiplied out, in their order, and G meets the result.

    Args:
        shape: of the input, (n_1, ..., n_m, I).
        ranks: of its Tucker form, the feature mode last.
        out_features: O.
    """
    sizes, small, r = list(shape[:-1]), list(ranks[:-1]), ranks[-1]
    rows, modes = prod(sizes), range(len(sizes))
    shrinking = sorted(modes, key=lambda m: small[m] / sizes[m])
    shrink = _mode_products([*sizes, out_features], small, shrinking)
    growing = sorted(modes, key=lambda m: sizes[m] / small[m])
    if shrink <= _mode_products(ranks, sizes, growing) + 2 * rows * out_features * r:
        return shrink + 2 * prod(small) * out_features * r
    return _mode_products(ranks, sizes, modes) + 2 * rows * out_features * r


def tucker_dense_weight_gradient_flops(shape: Sequence[int], ranks: Sequence[int], out_features: int) -> int:
    """The contraction and 2 O I r: A U.T, the dense gradient of `asi`."""
    return tucker_contraction_flops(shape, ranks, out_features) + 2 * out_features * shape[-1] * ranks[-1]


def factor_tucker_weight_gradient_flops(
    shape: Sequence[int], ranks: Sequence[int], out_features: int, rank: int
) -> int:
    """The contraction and 4 K r (I + O): A (R U).T and (L.T A) U.T, the gradients of `wasi`'s factors."""
    return tucker_contraction_flops(shape, ranks, out_features) + 4 * rank * ranks[-1] * (shape[-1] + out_features)


def compression_flops(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """One warm subspace iteration a mode, on the tensor that the modes before it have shrunk: 6 r_i times its size.

    Args:
        shape: of the input, (n_1, ..., n_m, I).
        ranks: one per mode, none above what the mode can have.
    """
    sizes, total = list(shape), 0
    for mode, rank in enumerate(ranks):
        total += 6 * rank * prod(sizes)
        sizes[mode] = rank
    return total


def _mode_products(shape: Sequence[int], new_sizes: Sequence[int], order: Sequence[int]) -> int:
    """FLOPs of multiplying the leading modes of a tensor to new sizes, in the given order."""
    sizes, total = list(shape), 0
    for mode in order:
        total += 2 * prod(sizes) * new_sizes[mode]
        sizes[mode] = new_sizes[mode]
    return total


# FLOPs of the optimizer step.


def fold_flops(in_features: int, out_features: int, rank: int, activation_rank: int) -> int:
    """4 K^2 (I + O) + 2 K^3 + K r (4 I + 6 O + 8 K + 4 r) + 2 r^2 (I + O): one subspace iteration on L R + update U.T.

    With a square left factor, K = O, only the coordinates move, 2 K r (O + I). The counts are those of
    `thintune.linalg.warm_subspace_step_` where one pass makes the columns orthonormal.
    """
    i, o, k, r = in_features, out_features, rank, activation_rank
    if k == o:
        return 2 * k * r * (o + i)
    return 4 * k * k * (i + o) + 2 * k**3 + k * r * (4 * i + 6 * o + 8 * k + 4 * r) + 2 * r * r * (i + o)


# Bytes kept by the lean branches of a transformer block.


def lean_branch_saved_bytes(
    rows: int,
    width: int,
    first_rank: int,
    first_activation_rank: int,
    second_activation_rank: int,
    scaled_rank: int | None = None,
    *,
    exact_norm: bool = False,
    element_bytes: int = FLOAT_BYTES,
) -> int:
    """M (D + e (2 + K_1 + r_1 + r_2)): 8-bit normalised input, its step and 1 / std, z = y R.T, both projections.

    Args:
        rows: M.
        width: D.
        first_rank: K_1 of the branch's first layer.
        first_activation_rank: r_1.
        second_activation_rank: r_2.
        scaled_rank: K_2 of the second layer where a layer scale needs its thin product, else None.
        exact_norm: the normalised input is kept whole.
        element_bytes: e of one value.
    """
    values = 2 + first_rank + first_activation_rank + second_activation_rank + (scaled_rank or 0)
    return rows * (width * (element_bytes if exact_norm else 1) + element_bytes * values)
