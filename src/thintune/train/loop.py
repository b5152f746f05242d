"""The optimizer steps of a run: micro-batches, schedule, checkpoints, and what stops them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thintune.config import TrainConfig
from thintune.data import Split, epoch_batches, micro_batches
from thintune.errors import DivergenceError
from thintune.measure import SavedActivations, count_flops, release_free_memory, reuse_freed_blocks
from thintune.optim import LayerwiseStep, ThinStep, learning_rate_factor


@dataclass
class Progress:
    """How far a run is, and what it measured on the way."""

    step: int = 0
    """Optimizer steps done."""
    loss: float | None = None
    """Mean loss of the last step's images."""
    epoch_losses: list[float] = field(default_factory=list)
    step_times_s: list[float] = field(default_factory=list)
    """Of full batches in this process, without its first step."""
    saved_activation_bytes: int | None = None
    flops_per_step: int | None = None


class Loop:
    """Runs the optimizer steps of one training run.

    Args:
        model: to train.
        optimizer: over its parameters.
        thin_step: hooked onto the optimizer.
        split: training images.
        config: schedule and sizes.
        device: of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        thin_step: ThinStep,
        split: Split,
        config: TrainConfig,
        device: str,
    ) -> None:
        self.model, self.optimizer, self.thin_step = model, optimizer, thin_step
        self.split, self.config, self.device = split, config, device
        self.steps_per_epoch = math.ceil(len(split) / config.batch_size)
        self.steps = self.steps_per_epoch * config.epochs
        if config.max_steps is not None:
            self.steps = min(self.steps, config.max_steps)
        self.progress = Progress()
        self._layerwise: LayerwiseStep | None = None
        if config.layerwise_update:
            self._layerwise = LayerwiseStep(model, optimizer, thin_step, self._check_gradients)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._measured = self._settled = False

    def run(self, after_step: Callable[[Progress], bool]) -> bool:
        """Steps until the end.

        Args:
            after_step: called after every step; returning False stops the run there.

        Returns:
            Whether the run reached its end.

        Raises:
            DivergenceError: a loss or a gradient that is not finite; the weights are those before the step.
        """
        epoch, batches = -1, []
        while self.progress.step < self.steps:
            now, index = divmod(self.progress.step, self.steps_per_epoch)
            if now != epoch:
                epoch, batches = now, epoch_batches(len(self.split), self.config.batch_size, self.config.seed, now)
                if index == 0:  # a run taken up inside an epoch keeps what it had
                    self.progress.epoch_losses = []
            self._timed_step(batches[index])
            if not after_step(self.progress):
                return self.progress.step >= self.steps
        return True

    def step(self, indices: Tensor) -> None:
        """Takes one optimizer step on the images of these rows and measures nothing."""
        self.model.train()
        self._step(indices)
        self._settle()
        self.progress.step += 1

    def _timed_step(self, indices: Tensor) -> None:
        self.model.train()
        if not self._measured:
            self.progress.flops_per_step = count_flops(lambda: self._step(indices, measure=True))
            self._measured = True
        else:
            begun = time.perf_counter()
            self._step(indices)
            if len(indices) == self.config.batch_size:
                self.progress.step_times_s.append(time.perf_counter() - begun)
        self._settle()
        self.progress.step += 1

    def _settle(self) -> None:
        """After the first step all that stays has been made: what is freed from now on is used again."""
        if self._layerwise is not None and self.config.reuse_memory and not self._settled:
            release_free_memory()
            reuse_freed_blocks()
        self._settled = True

    def _step(self, indices: Tensor, measure: bool = False) -> None:
        factor = learning_rate_factor(self.progress.step, self.steps, self.config.warmup_fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.config.learning_rate
        total = 0.0
        parts = micro_batches(indices, self.config.micro_batch)
        if self._layerwise is not None:
            self._layerwise.begin()
        for number, rows in enumerate(parts):
            images, labels = self.split.images(rows).to(self.device), self.split.labels[rows].to(self.device)
            if measure and self.progress.saved_activation_bytes is None:
                with SavedActivations(exclude=self.model) as saved:
                    loss = self._loss(images, labels, len(indices))
                    self.progress.saved_activation_bytes = saved.bytes
            else:
                loss = self._loss(images, labels, len(indices))
            value = float(loss.detach())
            if not math.isfinite(value):
                self._diverged("loss", value, images)
            last = self._layerwise is not None and number == len(parts) - 1
            with self._layerwise.last() if last and self._layerwise else contextlib.nullcontext():
                loss.backward()
            total += value
        if self._layerwise is None:
            self._whole_step()
        self.progress.loss = total
        self.progress.epoch_losses.append(total)

    def _whole_step(self) -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if not math.isfinite(float(norm)):
            self._diverged("gradient norm", float(norm), None)
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.config.clip_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _check_gradients(self, name: str, gradients: list[Tensor]) -> None:
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            self._raise_diverged("gradient norm", norm, name)

    def _loss(self, images: Tensor, labels: Tensor, batch: int) -> Tensor:
        smoothing = self.config.label_smoothing
        return F.cross_entropy(self.model(images), labels, label_smoothing=smoothing, reduction="sum") / batch

    def _diverged(self, what: str, value: float, images: Tensor | None) -> None:
        where = first_non_finite_layer(self.model, images) if images is not None else self._bad_gradient()
        self._raise_diverged(what, value, where)

    def _raise_diverged(self, what: str, value: float, where: str) -> None:
        raise DivergenceError(
            f"step {self.progress.step + 1}: {what} is {value}, first seen at {where}; the last good checkpoint is "
            "kept. Lower train.learning_rate, or set train.clip_norm."
        )

    def _bad_gradient(self) -> str:
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                return name
        return "the sum over all layers (each is finite)"


@torch.no_grad()
def first_non_finite_layer(model: nn.Module, images: Tensor) -> str:
    """Name of the first layer, in order of execution, whose parameters or output are not finite."""
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, _inputs: Any, output: Any) -> None:
            tensors = [*module.parameters(recurse=False), *([output] if isinstance(output, Tensor) else [])]
            if not found and not all(bool(torch.isfinite(t).all()) for t in tensors):
                found.append(name)

        return after

    layers = [(n, m) for n, m in model.named_modules() if not list(m.children()) or list(m.parameters(recurse=False))]
    handles = [module.register_forward_hook(hook(name)) for name, module in layers]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss"
