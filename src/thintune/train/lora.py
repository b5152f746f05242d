"""The LoRA and LoRA-FA baselines, by `peft`."""

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


def inject_lora_(model: nn.Module, config: LoraConfig, head: str, *, frozen_down: bool = False) -> None:
    """Adds an adapter to every linear layer but the head, which trains whole; all else is frozen.

    Args:
        model: to adapt, in place.
        config: rank and scale.
        head: name of the head.
        frozen_down: LoRA-FA (arXiv 2308.03303): A (r, I) keeps its random start and only B (O, r) trains. Autograd
            then keeps A x, (..., r), of each layer and not its input: neither the frozen weight nor A needs x for its
            gradient. A starts as peft starts it for LoRA.
    """
    peft = import_peft()
    targets = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != head]
    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets)
    model.requires_grad_(False)
    peft.inject_adapter_in_model(settings, model)
    if frozen_down:
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
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
