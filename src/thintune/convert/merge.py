"""Thin layers back to dense ones."""

from __future__ import annotations

import torch
from torch import nn

from thintune.convert.selection import set_submodule
from thintune.nn import CompressedLinear, ThinLinear


@torch.no_grad()
def merge_(model: nn.Module) -> nn.Module:
    """Replaces every thin layer by the dense layer it stands for, in place, one layer at a time.

    Args:
        model: any module; layers that are not thin stay as they are.

    Returns:
        The same model.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, ThinLinear):
            weight = module.left @ module.right
        elif isinstance(module, CompressedLinear):
            weight = module.weight.detach()
        else:
            continue
        dense = nn.Linear(
            module.in_features, module.out_features, module.bias is not None, device="meta", dtype=weight.dtype
        )
        dense.weight = nn.Parameter(weight)
        dense.bias = None if module.bias is None else nn.Parameter(module.bias.detach())
        dense.train(module.training)
        set_submodule(model, name, dense)
    return model
