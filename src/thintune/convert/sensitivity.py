"""What each output feature of the layers is worth: its gradient under random projections of the model's features.

No label is needed: for a loss p.T f with random signs p on standardised features f, the gradient g of a layer's output
has E[g g.T] = E[J.T J], with J the Jacobian of f. That is the Gauss-Newton matrix of a squared error of the features.

Along a chain of blocks (`walk`) only one block runs backward at a time, on its own dense weights: what enters each of
them is kept for one batch. Whatever is no chain runs backward as a whole, its dense weights all in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thintune.convert.calibration import Call, block_of, evaluating, run
from thintune.convert.weights import DenseLayers
from thintune.errors import ConversionError


def output_worths(
    model: nn.Module, dense: DenseLayers, batches: Sequence[Any], chains: Mapping[str, Sequence[str]], seed: int = 0
) -> dict[str, Tensor]:
    """Sum of g^2 over all rows of all batches, for each output feature of each layer.

    A sum, so that a layer that is called on more rows counts for more.

    Args:
        model: holds the layers, dense as yet; gets no gradients.
        dense: the layers.
        batches: calibration inputs.
        chains: of the model's blocks, as `walk.chains` finds them.
        seed: of the projections; no other random number is drawn.

    Returns:
        (O,) float64 by layer; zeros for a layer that the features do not depend on.

    Raises:
        ConversionError: the model's features are no tensor.
    """
    chain = _the_chain(dense, chains)
    spread = _feature_spread(model, dense, batches)
    generator = torch.Generator().manual_seed(seed)
    total = {name: torch.zeros(layer.out_features, dtype=torch.float64) for name, layer in dense.layers.items()}

    def add(name: str, gradient: Tensor | None) -> None:
        if gradient is not None:
            total[name] += gradient.reshape(-1, gradient.shape[-1]).double().square().sum(0).cpu()

    for batch in batches:
        if chain:
            _along_chain(model, dense, batch, chain, spread, generator, add)
        else:
            with dense.resident(), evaluating(model), _outputs(model, dense.layers) as outputs, torch.enable_grad():
                loss = _projection(_features(model, dense, batch), spread, generator)
                _hand_out(loss, outputs, add)
    return total


def _the_chain(dense: DenseLayers, chains: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of the blocks of the one chain that holds all layers, or nothing."""
    wanted = {block_of(name) for name in dense.layers}
    return next((list(names) for names in chains.values() if wanted <= set(names)), [])


def _along_chain(
    model: nn.Module,
    dense: DenseLayers,
    batch: Any,
    chain: Sequence[str],
    spread: Tensor,
    generator: torch.Generator,
    add: Callable[[str, Tensor | None], None],
) -> None:
    calls: list[Call] = []
    ends: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(args, kwargs))

    def cut(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        torch.set_grad_enabled(True)  # from here to the features a graph is recorded
        ends.append(output.detach().requires_grad_())
        return ends[0]

    handles = [model.get_submodule(n).register_forward_pre_hook(keep, with_kwargs=True) for n in chain]
    handles.append(model.get_submodule(chain[-1]).register_forward_hook(cut))
    try:
        with dense.resident(), evaluating(model):
            features = _features(model, dense, batch)
            with torch.enable_grad():
                loss = _projection(features, spread, generator)
    finally:
        for handle in handles:
            handle.remove()
    (gradient,) = torch.autograd.grad(loss, ends, allow_unused=True)
    del features, loss, ends[:]
    for name in reversed(chain):
        block, call = model.get_submodule(name), calls.pop()
        inside = {n: layer for n, layer in dense.layers.items() if n == name or n.startswith(f"{name}.")}
        with dense.resident(inside), evaluating(block), _outputs(model, inside) as outputs, torch.enable_grad():
            entered = call.args[0].detach().requires_grad_()
            output = block(entered, *call.args[1:], **call.kwargs)
            if gradient is None:
                gradient = torch.zeros_like(output)
            gradient = _hand_out(output, outputs, add, gradient, entered)
            del output


@contextlib.contextmanager
def _outputs(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[list[tuple[str, Tensor]]]:
    """Inside, collects the outputs of the layers, each part of a graph even where all parameters are frozen."""
    found: list[tuple[str, Tensor]] = []

    def hook(name: str) -> Callable[..., Tensor]:
        def after(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_()
            found.append((name, output))
            return output

        return after

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        found.clear()
        for handle in handles:
            handle.remove()


def _hand_out(
    end: Tensor,
    outputs: Sequence[tuple[str, Tensor]],
    add: Callable[[str, Tensor | None], None],
    gradient: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor | None:
    """Gives `add` the gradients of all outputs; returns that of `start`."""
    wanted = [tensor for _, tensor in outputs] + ([] if start is None else [start])
    if not wanted or not end.requires_grad:
        return None
    found = torch.autograd.grad(end, wanted, gradient, allow_unused=True)
    for (name, _), each in zip(outputs, found, strict=False):
        add(name, each)
    return None if start is None else found[-1]


def _features(model: nn.Module, dense: DenseLayers, batch: Any) -> Tensor:
    """What the last dense linear layer receives, the head; the model's output where a layer to convert comes last."""
    seen: list[Any] = [None]

    def head(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs:
            seen[0] = inputs[0]

    def body(_module: nn.Module, _inputs: Any) -> None:
        seen[0] = None

    def end(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if seen[0] is None:
            seen[0] = output

    inside = {id(layer) for layer in dense.layers.values()}
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [m.register_forward_pre_hook(body if id(m) in inside else head) for m in linears]
    handles.append(model.register_forward_hook(end))
    try:
        run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(seen[0], Tensor):
        raise ConversionError(
            "thin.rank_allocation and thin.output_weighting: expected a model that returns a tensor or ends in a dense "
            f"linear layer, got {type(seen[0]).__name__}; use variance and none."
        )
    return seen[0]


def _feature_spread(model: nn.Module, dense: DenseLayers, batches: Sequence[Any]) -> Tensor:
    """(D,) standard deviation of each feature over all rows, float64; 1 where it does not vary."""
    count, total, square = 0, 0.0, 0.0
    with dense.resident(), evaluating(model):
        for batch in batches:
            rows = _features(model, dense, batch).flatten(0, -2).double()
            count, total, square = count + len(rows), total + rows.sum(0), square + rows.square().sum(0)
    assert isinstance(total, Tensor) and isinstance(square, Tensor)
    spread = (square / count - (total / count).square()).clamp_min(0).sqrt()
    return torch.where(spread > 1e-6 * spread.max(), spread, 1.0)


def _projection(features: Tensor, spread: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, features.shape, generator=generator).mul_(2).sub_(1)
    return (features * (signs.to(features) / spread.to(features))).sum()
