"""Closed-form bytes and FLOPs of the layers, as integers; knows no torch.

What is written here is what `thintune.measure` counts on the real layers: the tests hold the two to be equal.
"""

from thintune.costs.linear import (
    compression_flops,
    dense_forward_flops,
    dense_input_gradient_flops,
    dense_parameter_bytes,
    dense_saved_bytes,
    dense_weight_gradient_flops,
    factor_input_gradient_flops,
    factor_saved_bytes,
    factor_tucker_weight_gradient_flops,
    factor_weight_gradient_flops,
    fold_flops,
    lean_branch_saved_bytes,
    subspace_forward_flops,
    subspace_input_gradient_flops,
    subspace_saved_bytes,
    subspace_state_bytes,
    subspace_weight_gradient_flops,
    thin_forward_flops,
    thin_parameter_bytes,
    tucker_contraction_flops,
    tucker_dense_weight_gradient_flops,
    tucker_saved_bytes,
)

__all__ = [
    "compression_flops",
    "dense_forward_flops",
    "dense_input_gradient_flops",
    "dense_parameter_bytes",
    "dense_saved_bytes",
    "dense_weight_gradient_flops",
    "factor_input_gradient_flops",
    "factor_saved_bytes",
    "factor_tucker_weight_gradient_flops",
    "factor_weight_gradient_flops",
    "fold_flops",
    "lean_branch_saved_bytes",
    "subspace_forward_flops",
    "subspace_input_gradient_flops",
    "subspace_saved_bytes",
    "subspace_state_bytes",
    "subspace_weight_gradient_flops",
    "thin_forward_flops",
    "thin_parameter_bytes",
    "tucker_contraction_flops",
    "tucker_dense_weight_gradient_flops",
    "tucker_saved_bytes",
]
