"""Layers that replace `torch.nn.Linear`; the state of warm starts lives here and nowhere else."""

from thintune.nn.compression import TuckerCompressor
from thintune.nn.linear import CompressedLinear, FactorLinear, SubspaceLinear, ThinLinear

__all__ = ["CompressedLinear", "FactorLinear", "SubspaceLinear", "ThinLinear", "TuckerCompressor"]
