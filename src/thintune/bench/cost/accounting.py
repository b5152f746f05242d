"""The papers' accounting of a model as a row has built it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from thintune.bench.cost.rows import RANK, Row
from thintune.costs.paper import PaperLayer, paper_account
from thintune.nn import CompressedLinear, FactorLinear, SubspaceLinear, ThinLinear
from thintune.train.models import classifier_name


def paper_columns(model: nn.Module, row: Row, image: Tensor, batch_size: int) -> dict[str, Any]:
    """Weights, kept inputs and FLOPs as the papers count them, for one piece of the row, beside those of dense layers.

    Args:
        model: as trained, adapters merged.
        row: its method and micro-batch.
        image: (1, 3, S, S), shows the layers' shapes.
        batch_size: of the bench.
    """
    piece = row.micro_batch or batch_size
    layers = _layers(model, row, image, piece)
    dense = paper_account("dense", [dataclasses.replace(a, rank=None, activation_ranks=()) for a in layers])
    own = paper_account(row.method, layers)
    return {
        "images": piece,
        "weight_bytes": own.weight_bytes,
        "activation_bytes": own.activation_bytes,
        "memory_bytes": own.memory_bytes,
        "training_flops_per_image": own.training_flops // piece,
        "memory_ratio_to_dense": dense.memory_bytes / own.memory_bytes,
        "flops_ratio_to_dense": dense.training_flops / own.training_flops,
        "activation_ranks_of_first_layer": list(layers[0].activation_ranks) or None,
    }


@torch.no_grad()
def _layers(model: nn.Module, row: Row, image: Tensor, piece: int) -> list[PaperLayer]:
    head = model.get_submodule(classifier_name(model))
    found: list[PaperLayer] = []

    def visit(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        first, *rest = inputs[0].shape
        shape = (first * piece, *rest)
        found.append(PaperLayer(shape, int(_out_features(module)), *_ranks(module, row, shape)))

    chosen = [m for m in model.modules() if isinstance(m, ThinLinear | nn.Linear) and m is not head]
    handles = [module.register_forward_pre_hook(visit) for module in chosen]
    try:
        model.eval()(image)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _out_features(module: Any) -> int:
    return module.out_features


def _ranks(module: nn.Module, row: Row, shape: tuple[int, ...]) -> tuple[int | None, tuple[int, ...]]:
    """Rank of the weight or adapter, and ranks of the kept input."""
    if isinstance(module, SubspaceLinear):
        return module.rank, (module.basis.shape[1],)
    if isinstance(module, FactorLinear):
        ranks = () if module.compressor is None else module.compressor.ranks
        return module.rank, tuple(min(r, n) for r, n in zip(ranks, shape, strict=False))
    if isinstance(module, CompressedLinear):
        return None, tuple(min(r, n) for r, n in zip(module.compressor.ranks, shape, strict=True))
    return (RANK if row.method == "lora" else None), ()
