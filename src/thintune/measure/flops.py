"""FLOPs of any callable, counted operator by operator while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

Shape = Sequence[int]


def count_flops(fn: Callable[[], object]) -> int:
    """Runs `fn` once and returns the FLOPs of its matrix products, convolutions and attention, backward included.

    1 multiply-add = 2 FLOPs, and bias, scaling and causal masks are neither added nor subtracted. Counted as well are
    the operators that torch's own counter passes over: attention on a CPU, in-place products such as `addmm_`, and
    products with vectors. Not counted: elementwise work, and factorisations (QR, SVD, eigenvalues).

    The backward pass of fused attention is 5 products, one of them the scores computed anew.

    Args:
        fn: takes nothing; what it returns is dropped. To be run eagerly, not compiled.

    Returns:
        FLOPs; 0 is a count, not a failure.

    Example:
        >>> count_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 5))
        60
    """
    from torch.utils.flop_counter import FlopCounterMode

    fast_path = torch.backends.mha.get_fastpath_enabled()
    # The fused inference path of nn.MultiheadAttention is one opaque operator; without it the same products show.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False, custom_mapping=_missing_formulas()) as counter:
            fn()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return int(counter.get_total_flops())


def _missing_formulas() -> dict[Any, Callable[..., int]]:
    """Operators that torch's counter does not know; each formula gets shapes in place of tensors."""
    aten, more = torch.ops.aten, {}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        more[torch.ops.mkldnn._linear_pointwise] = _linear
    return {
        **more,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        aten.addmm_: _added_product,
        aten.baddbmm_: _added_product,
        aten.addbmm: _added_product,
        aten.addbmm_: _added_product,
        aten.addmv: _added_vector_product,
        aten.addmv_: _added_vector_product,
        aten.mv: _vector_product,
        aten.dot: _vector_product,
        aten.vdot: _vector_product,
        aten.addr: _added_outer_product,
        aten.addr_: _added_outer_product,
    }


def _attention(query: Shape, key: Shape, value: Shape, *_args: object, **_kwargs: object) -> int:
    """Scores and their product with the values; heads are those of the query, (batch, heads, tokens, features)."""
    batch, heads, rows, features = query
    return 2 * batch * heads * rows * key[2] * (features + value[3])


def _attention_backward(_grad: Shape, query: Shape, key: Shape, value: Shape, *_args: object, **_kwargs: object) -> int:
    """Scores again, the gradients of query and key (features each), of scores and value (value features each)."""
    batch, heads, rows, features = query
    return 2 * batch * heads * rows * key[2] * (3 * features + 2 * value[3])


def _added_product(_target: Shape, left: Shape, right: Shape, *_args: object, **_kwargs: object) -> int:
    return 2 * prod(left) * right[-1]


def _linear(x: Shape, weight: Shape, *_args: object, **_kwargs: object) -> int:
    return 2 * prod(x) * weight[0]


def _vector_product(left: Shape, _right: Shape, *_args: object, **_kwargs: object) -> int:
    return 2 * prod(left)


def _added_vector_product(_target: Shape, matrix: Shape, _vector: Shape, *_args: object, **_kwargs: object) -> int:
    return 2 * prod(matrix)


def _added_outer_product(_target: Shape, left: Shape, right: Shape, *_args: object, **_kwargs: object) -> int:
    return 2 * prod(left) * prod(right)
