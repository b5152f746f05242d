"""Pure functions on matrices and tensors: truncation, orthonormalisation, subspace iteration, Tucker forms.

Legend: O output features, I input features, K rank of a weight, r rank of an activation's feature mode,
M rows (all leading axes of an activation, flattened).
"""

from thintune.linalg.angles import principal_angles
from thintune.linalg.factors import data_aware_factors, input_basis, output_spectrum
from thintune.linalg.orthonormal import orthonormalize
from thintune.linalg.rounding import rounded_subspace_step_, stochastic_round_
from thintune.linalg.sketch import leading_directions
from thintune.linalg.subspace import (
    subspace_iteration,
    warm_subspace_step,
    warm_subspace_step_,
    warm_subspace_step_reference,
)
from thintune.linalg.svd import rank_for_explained_variance, truncated_svd
from thintune.linalg.tucker import (
    compress_warm,
    hosvd,
    mode_dot,
    mode_ranks,
    reconstruct,
    sketch,
    st_hosvd,
    unfold,
)
from thintune.linalg.weighted import weighted_factors, weighted_spectrum, worth_root
from thintune.linalg.whitened import whitened_factors

__all__ = [
    "compress_warm",
    "data_aware_factors",
    "hosvd",
    "input_basis",
    "leading_directions",
    "mode_dot",
    "mode_ranks",
    "orthonormalize",
    "output_spectrum",
    "principal_angles",
    "rank_for_explained_variance",
    "reconstruct",
    "rounded_subspace_step_",
    "sketch",
    "st_hosvd",
    "stochastic_round_",
    "subspace_iteration",
    "truncated_svd",
    "unfold",
    "warm_subspace_step",
    "warm_subspace_step_",
    "warm_subspace_step_reference",
    "weighted_factors",
    "weighted_spectrum",
    "whitened_factors",
    "worth_root",
]
