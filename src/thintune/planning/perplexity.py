"""The perplexity table: what each choice of Tucker ranks costs a layer in gradient error (arXiv 2505.05086, sec. 3).

The published method calls the error of the weight gradient *perplexity*. For each layer and each share of explained
variance the table holds the ranks, the bytes that the kept input takes and that error; the dynamic programme of
`thintune.planning.knapsack` then picks one row a layer under a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thintune.linalg import mode_ranks, reconstruct, st_hosvd
from thintune.planning.knapsack import Option, choose

SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Row:
    """One choice for one layer."""

    explained_variance: float
    ranks: tuple[int, ...]
    saved_bytes: int
    perplexity: float
    """Frobenius norm of the weight gradient's error; larger ranks mostly, but not always, make it smaller."""


def pseudo_label_loss(output: Tensor) -> Tensor:
    """Cross entropy against the model's own most likely class: a loss that needs no labels."""
    return F.cross_entropy(output, output.argmax(-1))


def perplexity_table(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batch: Any,
    *,
    loss: Callable[[Any], Tensor] = pseudo_label_loss,
    shares: Sequence[float] = SHARES,
) -> dict[str, list[Row]]:
    """Measures every share for every layer on one batch, with one forward and backward pass a layer.

    One layer's input and output gradient are held at a time, so the pass needs no more memory than a step.

    Args:
        model: in its dense form.
        layers: of the model, by name.
        batch: inputs, as large as a micro-batch of training; a tuple or a dict is unpacked into arguments.
        loss: of the model's output.
        shares: of each mode's variance.

    Returns:
        Rows by layer, in the order of `shares`; a layer that the batch does not reach, or more than once, is missing.
    """
    table: dict[str, list[Row]] = {}
    for name, layer in layers.items():
        pair = _input_and_gradient(model, layer, batch, loss)
        if pair is not None:
            table[name] = [_row(*pair, share) for share in shares]
    return table


def _input_and_gradient(
    model: nn.Module, layer: nn.Linear, batch: Any, loss: Callable[[Any], Tensor]
) -> tuple[Tensor, Tensor] | None:
    seen: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        probe = output.detach().requires_grad_()
        seen.extend((inputs[0].detach(), probe))
        return probe.clone()  # what comes next may work in place, which a leaf does not allow

    handle = layer.register_forward_hook(keep)
    modes = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    try:
        with torch.enable_grad():
            value = loss(_call(model, batch))
            if len(seen) != 2:
                return None
            gradient = None
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value, seen[1], allow_unused=True)
    finally:
        handle.remove()
        for parameter, mode in modes.items():
            parameter.requires_grad_(mode)
    return seen[0], torch.zeros_like(seen[1]) if gradient is None else gradient


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _row(x: Tensor, gradient: Tensor, share: float) -> Row:
    core, factors = st_hosvd(x, mode_ranks(x, share))
    lost = (x - reconstruct(core, factors)).flatten(0, -2)
    error = float((gradient.flatten(0, -2).T @ lost).norm())
    kept = core.numel() + sum(f.numel() for f in factors)
    return Row(share, tuple(core.shape), kept * x.element_size(), error)


def plan_activations(table: Mapping[str, Sequence[Row]], budget_bytes: int) -> dict[str, tuple[int, ...]]:
    """Ranks by layer that minimise the summed perplexity under a budget for the kept inputs.

    Raises:
        ConfigError: even the smallest rows exceed the budget.
    """
    names = list(table)
    options = [[Option(row.saved_bytes, row.perplexity) for row in table[name]] for name in names]
    return {n: table[n][i].ranks for n, i in zip(names, choose(options, budget_bytes), strict=True)}
