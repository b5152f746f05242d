"""Autograd functions of the thin layers; `reference` holds the slow readable twin of each.

Legend: O output features, I input features, K rank of a weight, r rank of an activation's feature mode, M rows (all
leading axes of an activation, flattened); G the gradient of a layer's output, x~ what is kept of its input,
D = G.T x~ the weight gradient, never formed in a layer of low-rank weight.
"""

from thintune.ops.branches import BranchOptions, ThinWeights, attention_branch, mlp_branch
from thintune.ops.compressed import compressed_linear
from thintune.ops.factors import factor_linear
from thintune.ops.normalize import lean_layer_norm
from thintune.ops.products import limit_kernels, linear, without_kernels
from thintune.ops.subspace import subspace_linear
from thintune.ops.tucker_gradient import tucker_weight_gradient
from thintune.ops.workspace import release_buffers

__all__ = [
    "BranchOptions",
    "ThinWeights",
    "attention_branch",
    "compressed_linear",
    "factor_linear",
    "lean_layer_norm",
    "limit_kernels",
    "linear",
    "mlp_branch",
    "release_buffers",
    "subspace_linear",
    "tucker_weight_gradient",
    "without_kernels",
]
