"""What a method is beside the conversion of layers: what it freezes and adds, its optimizer, and what it ships."""

from __future__ import annotations

import torch
from torch import nn

from thintune.config import RunConfig
from thintune.optim import build_optimizer
from thintune.optim.galore import build_galore, check_galore, import_galore
from thintune.train.adapters import add_adapters_, merge_adapters_
from thintune.train.lora import import_peft, inject_lora_, merge_lora_
from thintune.train.models import classifier_name

_LORA = ("lora", "lora_fa")


def import_for(config: RunConfig) -> None:
    """Imports the library that a method is taken from.

    Raises:
        MissingDependencyError: it is not installed.
    """
    if config.method in _LORA:
        import_peft()
    elif config.method == "galore":
        import_galore()


def prepare_(model: nn.Module, config: RunConfig, head: str) -> None:
    """Adds adapters and freezes what does not train; a converted or dense model stays as it is.

    Args:
        model: converted, with values or on the meta device, to be filled from a saved state.
        config: `head` trains the head alone: nothing before it needs a gradient, so autograd keeps none of it, and a
            step is a forward pass and one small product. `lora` and `lora_fa` train adapters and the head, as does
            `svd_lora` beside its frozen thin layers.
        head: name of the head.

    Raises:
        ConfigError: subspaces of `galore` that no layer is large enough for.
    """
    if config.method == "head":
        model.requires_grad_(False)
        model.get_submodule(head).requires_grad_(True)
    elif config.method in _LORA:
        inject_lora_(model, config.lora, head, frozen_down=config.method == "lora_fa")
    elif config.method == "svd_lora":
        add_adapters_(model, config.lora, head)
    elif config.method == "galore":
        check_galore(model, head, config.galore.rank)


def make_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """Builds the optimizer that the method and the configuration ask for."""
    if config.method == "galore":
        return build_galore(model, classifier_name(model), config.train, config.galore)
    return build_optimizer(model, config.train)


def finish_(model: nn.Module, config: RunConfig) -> None:
    """Merges the adapters of a trained model, which is then as it is shipped."""
    if config.method in _LORA:
        merge_lora_(model)
    elif config.method == "svd_lora":
        merge_adapters_(model)
