"""The optimizer's step, taken layer by layer while the last backward pass still runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from thintune.measure import returning_large_blocks
from thintune.nn import FactorLinear, SubspaceLinear
from thintune.optim.step import ThinStep


@dataclass
class _Unit:
    """The parameters of one module, stepped together."""

    name: str
    parameters: list[nn.Parameter]
    factored: bool
    """Whether it is a `FactorLinear`."""
    thin: bool
    """Whether it is a `SubspaceLinear`."""
    waiting: set[int] = field(default_factory=set)
    """Identities of the parameters whose gradient is not complete yet."""


class LayerwiseStep:
    """Steps every layer as soon as its gradient is complete, and lets go of the gradient at once.

    Equal to `optimizer.step()` after the last backward pass, bit for bit, for every optimizer that treats parameters
    one by one (all of torch's but LBFGS); clipping by the norm of the whole gradient cannot be had this way.

    - The zero updates of all `SubspaceLinear` layers of a shape share one memory: between two steps they hold nothing.
    - Gradients of `torch.optim.SGD` with plain momentum add up in the momentum itself, b <- mu b + g_1 + g_2 + ...,
      so that there is one buffer a parameter instead of two. Only the order of this sum differs from SGD's own. Not
      so in a `FactorLinear`, whose gradient is turned before it meets the momentum.

    Args:
        model: to train.
        optimizer: over its parameters; a parameter belongs to one module.
        thin_step: hooked onto the optimizer.
        check: called with a layer's name and its gradients before its step; raises where they are no good.

    Example:
        layerwise.begin()
        ...
        with layerwise.last():  # the micro-batches before were plain: loss.backward()
            loss.backward()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        thin_step: ThinStep,
        check: Callable[[str, list[Tensor]], None] | None = None,
    ) -> None:
        self._optimizer, self._thin_step, self._check = optimizer, thin_step, check
        self._units: dict[int, _Unit] = {}
        self._armed = False
        self._reached: set[int] = set()
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, module in model.named_modules():
            found = [p for p in module.parameters(recurse=False) if id(p) in owned and id(p) not in self._units]
            unit = _Unit(name, found, isinstance(module, FactorLinear), isinstance(module, SubspaceLinear))
            for parameter in found:
                self._units[id(parameter)] = unit
                parameter.register_post_accumulate_grad_hook(self._arrived)
        thin_step.by_layer = True
        _share_updates_(model)

    @torch.no_grad()
    def begin(self) -> None:
        """Begins an optimizer step, before its first backward pass."""
        self._reached.clear()
        with returning_large_blocks():  # momentum is made here, not among what a backward pass needs for a moment
            for group, parameter in self._summed():
                momentum = self._optimizer.state.get(parameter, {}).get("momentum_buffer")
                if momentum is None:
                    parameter.grad = torch.zeros_like(parameter)
                else:
                    parameter.grad = momentum.mul_(group["momentum"])

    def _summed(self) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
        """The parameters whose gradients add up in their momentum, and their groups."""
        if type(self._optimizer) is torch.optim.SGD:
            for group in self._optimizer.param_groups:
                if group["momentum"] and not (group["nesterov"] or group["dampening"] or group["maximize"]):
                    yield from ((group, p) for p in group["params"] if not self._units[id(p)].factored)

    @contextlib.contextmanager
    def last(self) -> Iterator[None]:
        """The backward pass inside is the last one of this optimizer step."""
        units = {id(unit): unit for unit in self._units.values()}.values()
        for unit in units:
            unit.waiting = {id(p) for p in unit.parameters}
        self._armed = True
        try:
            yield
            for unit in units:
                if unit.waiting:  # what this pass did not reach may hold gradients of earlier ones
                    self._step(unit)
        finally:
            self._armed = False
        self._thin_step.finish()

    def _arrived(self, parameter: Tensor) -> None:
        self._reached.add(id(parameter))
        if self._armed:
            unit = self._units[id(parameter)]
            unit.waiting.discard(id(parameter))
            if not unit.waiting:
                self._step(unit)

    @torch.no_grad()
    def _step(self, unit: _Unit) -> None:
        unit.waiting.clear()
        for parameter in unit.parameters:
            started = "momentum_buffer" in self._optimizer.state.get(parameter, {})
            if id(parameter) not in self._reached and not started:
                parameter.grad = None  # as SGD leaves a parameter alone that no gradient ever reached
        gradients = [p.grad for p in unit.parameters if p.grad is not None]
        if self._check is not None:
            self._check(unit.name, gradients)
        mine = {id(p) for p in unit.parameters}
        whole = self._optimizer.param_groups
        self._optimizer.param_groups = [
            {**group, "params": [p]} for group in whole for p in group["params"] if id(p) in mine
        ]
        for part, parameter in list(self._summed()):
            if parameter.grad is None:
                continue
            self._optimizer.state[parameter]["momentum_buffer"] = parameter.grad
            part["momentum"] = 0.0  # done
            if not unit.thin:  # an update is zero: ThinStep decays what it stands for, by the rate of its group
                parameter.grad.add_(parameter, alpha=part["weight_decay"])
                part["weight_decay"] = 0.0
        try:
            with returning_large_blocks():  # comes once a step: rather a page fault than a larger heap
                self._optimizer.step()
        finally:
            self._optimizer.param_groups = whole
        for parameter in unit.parameters:
            parameter.grad = None


def _share_updates_(model: nn.Module) -> None:
    """Lets the updates of a shape, all zero between steps, live in the same memory."""
    shared: dict[tuple[object, ...], Tensor] = {}
    for module in model.modules():
        if isinstance(module, SubspaceLinear):
            update = module.update
            key = (tuple(update.shape), update.dtype, update.device)
            update.data = shared.setdefault(key, update.data)
