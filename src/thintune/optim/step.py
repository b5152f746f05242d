"""What happens to thin layers around an optimizer's step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from thintune.linalg import orthonormalize, rounded_subspace_step_, warm_subspace_step_
from thintune.nn import FactorLinear, SubspaceLinear, TuckerCompressor

_ADAPTIVE = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
)
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta")
_MAGNITUDES = ("exp_inf",)  # roots of second moments


class ThinStep:
    """Makes any torch optimizer train the thin layers of a model.

    Hooks itself onto `optimizer.step()`; use the optimizer as ever, clipping and schedulers included.

    - `SubspaceLinear`: the optimizer stepped `update`, the weight's own step in the coordinates of `basis`. It is
      folded into the factors by one exact subspace iteration, then set back to zero. Weight decay is decoupled for
      every optimizer: right is scaled by 1 - lr * weight_decay. Every `refresh_every` steps its basis moves and the
      optimizer's moments are turned into the new one (the second moments by the squared turn); layers take turns, so
      that no step has to gather what all of them need.
    - `FactorLinear`: before the step the gradient of left is brought to its tangent-space form
      (I - L L.T) dL (R R.T)^-1; after it left is orthonormalised and right re-expressed, which leaves their product
      as it is. This is one subspace iteration on the stepped weight (WSI, arXiv 2510.09160).
    - `TuckerCompressor`: the warm start advances, once a step.

    Args:
        model: holds the thin layers; all their parameters must belong to `optimizer`.
        optimizer: any torch optimizer.
        refresh_every: steps between two moves of an activation basis.
        update_scale: factor on every update of a `SubspaceLinear`, beside the one that makes a learning rate mean the
            same as for the dense weight: an adaptive optimizer moves every coordinate by about the rate, so a step
            in r coordinates instead of I is shorter by sqrt(r / I) and is lengthened by its inverse. A step of plain
            gradient descent needs no such factor.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, refresh_every: int = 25, update_scale: float = 1.0
    ) -> None:
        self.steps = 0
        self.refresh_every = refresh_every
        self.update_scale = update_scale
        self.by_layer = False
        """Whether the optimizer steps layer by layer, and `finish` is called after the last."""
        self._adaptive = isinstance(optimizer, _ADAPTIVE)
        self._optimizer = optimizer
        modules = list(model.modules())
        self._subspace = [m for m in modules if isinstance(m, SubspaceLinear)]
        self._factor = [m for m in modules if isinstance(m, FactorLinear)]
        self._compressors = [m for m in modules if isinstance(m, TuckerCompressor)]
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._before()),
            optimizer.register_step_post_hook(lambda *_: self._after()),
        ]
        self._announce()

    def remove(self) -> None:
        """Unhooks itself."""
        for handle in self._handles:
            handle.remove()

    def restore_(self, steps: int) -> None:
        """Continues the refresh rhythm after `steps` optimizer steps."""
        self.steps = steps
        self._announce()

    def _announce(self) -> None:
        """Tells layers whether the coming step's inputs are needed for a new basis."""
        for place, layer in enumerate(self._subspace):
            layer.capturing = (self.steps + 1 + place) % self.refresh_every == 0

    def finish(self) -> None:
        """Ends an optimizer step: warm starts advance, and the next step's needs are announced."""
        for compressor in self._compressors:
            compressor.advance_()
        self.steps += 1
        self._announce()

    @torch.no_grad()
    def _before(self) -> None:
        stepped = self._stepped()
        for layer in self._factor:
            if layer.left.grad is not None and id(layer.left) in stepped:
                layer.left.grad = tangent_gradient(layer.left, layer.right, layer.left.grad)

    @torch.no_grad()
    def _after(self) -> None:
        stepped = self._stepped()
        for layer in self._subspace:
            if id(layer.update) not in stepped:
                continue
            if layer.update.grad is not None:
                self._fold(layer, stepped[id(layer.update)])
            if layer.capturing:
                turn = layer.refresh_basis_()
                if turn is not None:
                    _turn_moments(self._optimizer.state.get(layer.update, {}), layer.update, turn)
        for layer in self._factor:
            if layer.left.grad is not None and id(layer.left) in stepped:
                _reorthonormalize(layer)
        if not self.by_layer:
            self.finish()

    def _stepped(self) -> dict[int, dict[str, Any]]:
        """Identity of each parameter of the optimizer's present step, and its group."""
        return {id(p): group for group in self._optimizer.param_groups for p in group["params"]}

    def _fold(self, layer: SubspaceLinear, group: dict[str, Any]) -> None:
        decay = float(group.get("lr", 0.0)) * float(group.get("weight_decay", 0.0))
        scale = self.update_scale
        if self._adaptive:
            scale *= math.sqrt(layer.in_features / layer.update.shape[1])
        layer.update.mul_(scale)
        if layer.left.dtype != layer.update.dtype:
            rounded_subspace_step_(layer.left, layer.right, layer.update, layer.basis, decay)
        else:
            if decay:
                layer.right.mul_(1 - decay)
            warm_subspace_step_(layer.left, layer.right, layer.update, layer.basis)
        layer.update.zero_()


def tangent_gradient(left: Tensor, right: Tensor, grad: Tensor) -> Tensor:
    """(I - L L.T) dL (R R.T)^-1: the part of a step on W that turns its column space, in coordinates of left.

    Args:
        left: (O, K), orthonormal columns.
        right: (K, I).
        grad: (O, K), chain-rule gradient D R.T.

    Returns:
        (O, K).
    """
    gram = (right @ right.T).double()
    ridge = 1e-7 * float(gram.diagonal().mean())
    if not ridge:
        return torch.zeros_like(grad)  # right is zero: turning left moves nothing
    gram.diagonal().add_(ridge)
    outside = torch.addmm(grad, left, left.T @ grad, alpha=-1)
    return torch.linalg.solve(gram, outside.double(), left=False).to(grad.dtype)


def _reorthonormalize(layer: FactorLinear) -> None:
    left = orthonormalize(layer.left)
    layer.right.copy_((left.T @ layer.left) @ layer.right)
    layer.left.copy_(left)


def _turn_moments(state: dict[str, Any], parameter: Tensor, turn: Tensor) -> None:
    centre = state.get("grad_avg")
    if isinstance(centre, Tensor):  # RMSprop takes the root of square_avg - grad_avg^2: the variance is what turns
        state["square_avg"].addcmul_(centre, centre, value=-1).clamp_min_(0)
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            if name in _SECOND_MOMENTS:
                value.copy_(value @ turn.square())
            elif name in _MAGNITUDES:
                value.copy_((value.square() @ turn.square()).sqrt())
            else:
                value.copy_(value @ turn)
    if isinstance(centre, Tensor):
        state["square_avg"].addcmul_(centre, centre)
