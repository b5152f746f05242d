"""Thin layers back to dense ones."""

from __future__ import annotations

import torch
from torch import nn

from thintune.convert.selection import freeze_as_, replace_, trains
from thintune.nn import CompressedLinear, ThinLinear, make_plain_


@torch.no_grad()
def merge_(model: nn.Module) -> nn.Module:
    """Replaces every thin layer by the dense layer it stands for, in place, one layer at a time; blocks become plain.

    Args:
        model: any module; layers that are not thin stay as they are.

    Returns:
        The same model.
    """
    for module in list(model.modules()):
        make_plain_(module)
        if isinstance(module, ThinLinear):
            dtype = module.left.dtype if module.bias is None else module.bias.dtype
            weight = module.left.to(dtype) @ module.right.to(dtype)
        elif isinstance(module, CompressedLinear):
            weight = module.weight.detach()
        else:
            continue
        dense = nn.Linear(
            module.in_features, module.out_features, module.bias is not None, device="meta", dtype=weight.dtype
        )
        dense.weight = nn.Parameter(weight)
        if module.bias is not None:
            dense.bias = nn.Parameter(module.bias.detach())
        freeze_as_(dense, *trains(module))
        replace_(model, module, dense)
    return model
