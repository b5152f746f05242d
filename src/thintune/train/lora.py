"""The LoRA baseline, by `peft`."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from thintune.config import LoraConfig
from thintune.convert.selection import set_submodule
from thintune.errors import MissingDependencyError


def import_peft() -> Any:
    """Imports peft.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import peft
    except ImportError as error:
        raise MissingDependencyError("peft is not installed; run: pip install 'thintune[peft]'") from error
    return peft


def inject_lora_(model: nn.Module, config: LoraConfig, head: str) -> None:
    """Adds an adapter to every linear layer but the head, which trains whole; all else is frozen."""
    peft = import_peft()
    targets = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != head]
    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets)
    model.requires_grad_(False)
    peft.inject_adapter_in_model(settings, model)
    model.get_submodule(head).requires_grad_(True)


def merge_lora_(model: nn.Module) -> None:
    """Adds every adapter to its weight and puts the plain layer back."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer) and isinstance(module, nn.Module):
            module.merge()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
            base = module.get_base_layer()
            base.train(module.training)
            set_submodule(model, name, base)
