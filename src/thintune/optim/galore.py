"""GaLore (arXiv 2403.03507): the optimizer's state of a matrix lives in a subspace of its gradient.

The gradient G (O, I) of a weight is projected on its own leading singular vectors P, found anew every `update_gap`
steps: P.T G (r, I) where O < I, G P (O, r) otherwise. The update rule runs on that, and its result is projected back:
W <- W - lr scale P rule(P.T G). The projection is pytorch-optimizer's. The dense gradient is still made, and the
inputs of all layers are kept whole: what GaLore saves is optimizer state.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from thintune.config import GaloreConfig, TrainConfig
from thintune.errors import ConfigError, MissingDependencyError
from thintune.measure import release_free_memory
from thintune.optim.parameters import parameter_groups

_BETAS, _EPS = (0.9, 0.999), 1e-8  # of torch.optim.AdamW


def import_galore() -> Any:
    """Imports the projector of pytorch-optimizer.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector
    except ImportError as error:
        raise MissingDependencyError(
            "pytorch-optimizer, which projects GaLore's gradients, is not installed; run: pip install 'thintune[bench]'"
        ) from error
    return GaLoreProjector


def projected_weights(model: nn.Module, head: str, rank: int) -> list[Tensor]:
    """Weights of the linear layers, the head aside, that are larger than the subspace on both sides."""
    layers = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != head]
    return [layer.weight for layer in layers if layer.weight.requires_grad and min(layer.weight.shape) > rank]


def check_galore(model: nn.Module, head: str, rank: int) -> None:
    """Raises ConfigError for a rank that leaves no layer to project."""
    if not projected_weights(model, head, rank):
        sides = [min(weight.shape) for weight in projected_weights(model, head, 0)]
        raise ConfigError(
            f"galore.rank: expected less than the smaller side of a linear layer, {max(sides, default=0)} at most in "
            f"this model, got {rank}."
        )


def project(projector: Any, gradient: Tensor, step: int) -> Tensor:
    """The gradient in the projector's subspace, which moves at every `update_proj_gap`-th step."""
    before = projector.ortho_matrix
    low = projector.project(gradient, step)
    if projector.ortho_matrix is not before:
        release_free_memory(collect=False)  # what it worked in leaves holes in the heap, which the peak would stand on
    return low


def build_galore(model: nn.Module, head: str, train: TrainConfig, config: GaloreConfig) -> Galore:
    """GaLore on the weight of every linear layer but the head, the plain rule on everything else that trains.

    Raises:
        ConfigError: a rank that leaves no layer to project.
        MissingDependencyError: pytorch-optimizer is not installed.
    """
    check_galore(model, head, config.rank)
    inside = {id(weight) for weight in projected_weights(model, head, config.rank)}
    groups = []
    for group in parameter_groups(model, train.weight_decay):
        for projected in (True, False):
            members = [p for p in group["params"] if (id(p) in inside) == projected]
            groups += [{**group, "params": members, "projected": projected}] if members else []
    return Galore(groups, train, config)


class Galore(torch.optim.Optimizer):
    """AdamW, or SGD with momentum, in subspaces of the gradients; torch's own rules and constants.

    State of a projected weight: `projection`, (r, I) or (O, r); `step`; and what the rule keeps, of the size of the
    projected gradient. Moments stay as they are when the subspace moves, as published. Weight decay acts on the whole
    weight: decoupled for AdamW, added to the dense gradient for SGD. All state is in tensors: a run resumes bit for
    bit.

    Args:
        groups: of parameters, with `weight_decay` and, for those whose gradient is projected, `projected`.
        train: its optimizer, learning_rate and momentum.
        config: subspaces.

    Raises:
        MissingDependencyError: pytorch-optimizer is not installed.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], train: TrainConfig, config: GaloreConfig) -> None:
        self._projector = import_galore()
        self._config, self._adaptive = config, train.optimizer == "adamw"
        defaults = {"lr": train.learning_rate, "momentum": train.momentum, "weight_decay": 0.0, "projected": False}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Steps every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if group["projected"]:
                    self._step_projected(parameter, parameter.grad, group)
                else:
                    self._rule(parameter, parameter.grad, self.state[parameter], group, group["weight_decay"])
        return loss

    def _step_projected(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, decay = self.state[weight], group["weight_decay"]
        if "projection" not in state and not bool(gradient.any()):
            return  # zeros have no directions: behind a head of zeros the first step has no gradient
        if not self._adaptive and decay:
            gradient = gradient.add(weight, alpha=decay)
        projector = self._projector(
            rank=self._config.rank, update_proj_gap=self._config.update_gap, scale=self._config.scale
        )
        projector.ortho_matrix = state.get("projection")
        done = state.setdefault("step", torch.tensor(0.0))
        low = project(projector, gradient, int(done))
        state["projection"] = projector.ortho_matrix = projector.ortho_matrix.contiguous()  # as a file gives it back
        update = torch.zeros_like(low)
        self._rule(update, low, state, group, 0.0)
        if self._adaptive:
            weight.mul_(1 - group["lr"] * decay)
        else:
            done += 1
        weight.add_(projector.project_back(update))

    def _rule(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], decay: float
    ) -> None:
        """One step of torch's functional rule; its state is made at the first."""
        if not self._adaptive:
            momenta = [state.get("momentum_buffer")]
            sgd(
                [parameter],
                [gradient],
                momenta,
                lr=group["lr"],
                momentum=group["momentum"],
                weight_decay=decay,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )
            if momenta[0] is not None:
                state["momentum_buffer"] = momenta[0]
            return
        if "exp_avg" not in state:
            state.setdefault("step", torch.tensor(0.0))
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        adamw(
            [parameter],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            lr=group["lr"],
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            weight_decay=decay,
            eps=_EPS,
            amsgrad=False,
            maximize=False,
        )
