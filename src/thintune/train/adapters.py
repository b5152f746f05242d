"""Adapters on frozen thin layers: what `svd_lora` trains."""

from __future__ import annotations

import dataclasses

from torch import nn

from thintune.config import LoraConfig
from thintune.convert import ConversionReport
from thintune.convert.selection import replace_
from thintune.nn import ThinLinear
from thintune.nn.adapter import AdaptedLinear


def add_adapters_(model: nn.Module, config: LoraConfig, head: str) -> None:
    """Puts an adapter beside every thin layer that has none; adapters and head train, all else is frozen."""
    adapted = {id(module.base) for module in model.modules() if isinstance(module, AdaptedLinear)}
    for layer in [module for module in model.modules() if type(module) is ThinLinear and id(module) not in adapted]:
        replace_(model, layer, AdaptedLinear(layer, config.rank, config.alpha))
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.down.requires_grad_(True)
            module.up.requires_grad_(True)
    model.get_submodule(head).requires_grad_(True)


def merge_adapters_(model: nn.Module) -> None:
    """Puts the merged layer in the place of every adapted one."""
    for module in [module for module in model.modules() if isinstance(module, AdaptedLinear)]:
        replace_(model, module, module.merged())


def count_adapters(report: ConversionReport, model: nn.Module) -> ConversionReport:
    """The report with the sizes of the layers as they will be shipped, adapters merged."""
    layers = []
    for layer in report.layers:
        module = model.get_submodule(layer.name)
        if isinstance(module, AdaptedLinear):
            size = module.kept_elements * module.down.element_size()
            layers.append(dataclasses.replace(layer, bytes_after=size))
        else:
            layers.append(layer)
    return dataclasses.replace(report, layers=layers)
