"""Layers that replace `torch.nn.Linear` and blocks that keep little; all state of warm starts lives here."""

from thintune.nn.block import LeanBlock, is_block, make_lean_, make_plain_, why_not_lean
from thintune.nn.compression import HosvdCompressor, TuckerCompressor
from thintune.nn.linear import CompressedLinear, FactorLinear, SubspaceLinear, ThinLinear
from thintune.nn.patches import PatchConv2d, make_patches_product_

__all__ = [
    "CompressedLinear",
    "FactorLinear",
    "HosvdCompressor",
    "LeanBlock",
    "PatchConv2d",
    "SubspaceLinear",
    "ThinLinear",
    "TuckerCompressor",
    "is_block",
    "make_lean_",
    "make_patches_product_",
    "make_plain_",
    "why_not_lean",
]
