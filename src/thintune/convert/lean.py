"""Which blocks of a model keep little for the backward pass."""

from __future__ import annotations

from torch import nn

from thintune.config import ThinConfig
from thintune.nn import is_block, make_lean_, make_patches_product_, why_not_lean


def make_blocks_lean_(model: nn.Module, config: ThinConfig) -> dict[str, str | None]:
    """Makes the blocks of a converted model lean where their kind and their layers allow it, its patch embedding too.

    Args:
        model: whose linear layers have been converted (method `thin`).
        config: which operations shall be lean.

    Returns:
        Name of every block of a known kind, and what kept it from being lean, or None.
    """
    lean = {name: getattr(config, name) == "lean" for name in ("attention", "activation", "norm")}
    if not (lean["attention"] or lean["activation"]):
        return {}
    make_patches_product_(model)
    found: dict[str, str | None] = {}
    for name, module in model.named_modules():
        if is_block(module):
            found[name] = why_not_lean(module)
            if found[name] is None:
                make_lean_(module, **lean)
    return found
