"""What thintune is compared with, each as an expert would write it in plain PyTorch.

All of them read the model's tensors one by one straight into their own memory (no value is held twice), use SGD with
momentum parameter by parameter (no foreach copies), set gradients to None, and checkpoint whole blocks without
reentrancy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thintune.bench.cost.rows import RANK, Row
from thintune.config import LoraConfig, ModelConfig
from thintune.data import Splits, micro_batches
from thintune.errors import ConfigError
from thintune.io.checkpoint import fill_
from thintune.optim.galore import import_galore, project, projected_weights
from thintune.train.lora import inject_lora_
from thintune.train.models import build_model, classifier_name, start_head_

LEARNING_RATE, MOMENTUM = 1e-4, 0.9
PROJECTION_GAP = 200
"""Steps between two singular value decompositions of GaLore, the default of its authors."""


class Peer:
    """A model and its optimizer step.

    Args:
        row: which peer.
        model: name and file of the dense weights.
        splits: of the synthetic data.
        image_size: of its images.
    """

    def __init__(self, row: Row, model: ModelConfig, splits: Splits, image_size: int) -> None:
        self._row, self._split = row, splits.train
        self.model = _load(row, model, splits.classes, image_size)
        head = classifier_name(self.model)
        fill_head_(self.model)
        if row.method == "lora":
            inject_lora_(self.model, LoraConfig(rank=RANK), head)
        if row.checkpointing:
            _checkpoint_blocks_(self.model)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._finish = self._prepare(head)

    def step(self, rows: Tensor) -> None:
        """One optimizer step on the images of these rows, or one for each micro-batch where that cannot be helped."""
        self.model.train()
        for part in micro_batches(rows, self._row.micro_batch):
            count = len(rows) if self._row.exact_accumulation else len(part)
            logits = self.model(self._split.images(part))
            loss = F.cross_entropy(logits, self._split.labels[part], reduction="sum") / count
            loss.backward()
        self._finish()

    def _prepare(self, head: str) -> Callable[[], None]:
        """Sets up the optimizer; returns what ends a step."""
        if self._row.method == "galore":
            return _galore(self.model, head, self._parameters, self._row.optimizer_in_backward)
        if self._row.update == "in_backward":
            return _step_in_backward(self._parameters)
        if self._row.update == "in_momentum":
            return _gradients_in_momentum(self._parameters)
        optimizer = torch.optim.SGD(self._parameters, lr=LEARNING_RATE, momentum=MOMENTUM, foreach=False)

        def finish() -> None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return finish


@torch.no_grad()
def fill_head_(model: nn.Module) -> None:
    """Gives the head values: a new one is zero, and lets no gradient through at the first step."""
    head: Any = model.get_submodule(classifier_name(model))
    head.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(0))


def _load(row: Row, config: ModelConfig, classes: int, image_size: int) -> nn.Module:
    if not row.mapped:
        return build_model(config, classes, image_size)
    from safetensors.torch import load_file

    assert config.checkpoint is not None
    model = build_model(config, classes, image_size, empty=True)
    mapped = load_file(config.checkpoint)
    names = {name for name, _ in model.named_parameters()}
    head = f"{classifier_name(model)}."
    fill_(model, {n: (lambda value=v: value) for n, v in mapped.items() if n in names and not n.startswith(head)})
    start_head_(model)
    return model


def _checkpoint_blocks_(model: nn.Module) -> None:
    from timm.layers.config import set_reentrant_ckpt

    set_reentrant_ckpt(False)
    switch: Any = getattr(model, "set_grad_checkpointing", None)
    if switch is None:
        raise ConfigError(f"{type(model).__name__}: expected a model of timm with set_grad_checkpointing.")
    switch(True)


def _step_in_backward(parameters: list[nn.Parameter]) -> Callable[[], None]:
    """One optimizer a parameter, stepped as soon as its gradient is there (as in PyTorch's tutorial)."""
    for parameter in parameters:
        optimizer = torch.optim.SGD([parameter], lr=LEARNING_RATE, momentum=MOMENTUM, foreach=False)

        def hook(_parameter: Tensor, optimizer: torch.optim.SGD = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        parameter.register_post_accumulate_grad_hook(hook)
    return lambda: None


def _gradients_in_momentum(parameters: list[nn.Parameter]) -> Callable[[], None]:
    """The gradient is never set to zero but scaled: it then is SGD's momentum, b <- mu b + g_1 + g_2 + ..."""

    @torch.no_grad()
    def finish() -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=-LEARNING_RATE)
                parameter.grad.mul_(MOMENTUM)

    return finish


class _Projected:
    """One matrix whose gradient lives in a subspace: G -> P.T G or G P, and so does its momentum."""

    def __init__(self, parameter: Tensor, projector: Any) -> None:
        self.parameter, self.projector = parameter, projector
        self.gradient: Tensor | None = None
        self.momentum: Tensor | None = None
        self.steps = 1

    @torch.no_grad()
    def take(self, _parameter: object = None) -> None:
        """Projects the dense gradient, adds it up and frees it: projection is linear, so the sum is exact."""
        if self.parameter.grad is None:
            return
        low = project(self.projector, self.parameter.grad, self.steps)
        self.gradient = low if self.gradient is None else self.gradient.add_(low)
        self.parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """SGD with momentum in the subspace."""
        if self.gradient is None:
            return
        self.momentum = self.gradient if self.momentum is None else self.momentum.mul_(MOMENTUM).add_(self.gradient)
        self.gradient = None
        self.parameter.add_(self.projector.project_back(self.momentum), alpha=-LEARNING_RATE)
        self.steps += 1


def _galore(model: nn.Module, head: str, parameters: list[nn.Parameter], in_backward: bool) -> Callable[[], None]:
    """GaLore on every linear layer but the head, plain momentum elsewhere."""
    make = import_galore()
    matrices = projected_weights(model, head, RANK)
    projected = [_Projected(w, make(rank=RANK, update_proj_gap=PROJECTION_GAP, scale=1.0)) for w in matrices]
    if in_backward:
        for one in projected:
            one.parameter.register_post_accumulate_grad_hook(one.take)
    inside = {id(weight) for weight in matrices}
    others = [p for p in parameters if id(p) not in inside]
    optimizer = torch.optim.SGD(others, lr=LEARNING_RATE, momentum=MOMENTUM, foreach=False)

    def finish() -> None:
        for one in projected:
            one.take()
            one.step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return finish
