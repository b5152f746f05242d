"""The resumable state of a run: everything that decides the next step's bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thintune.config import RunConfig, from_dict, to_dict
from thintune.convert.structure import describe
from thintune.errors import CheckpointError
from thintune.io import StoredTensors, read_tensors, write_tensors

FORMAT = "thintune-state"
_STEM = "state"


def save_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    progress: dict[str, Any],
) -> None:
    """Writes weights, bases, optimizer state and random state; data order and schedule follow from the step.

    Args:
        folder: replaced at the very end by an atomic rename.
        model: as it trains.
        optimizer: its state is stored by parameter name.
        config: of the run.
        progress: JSON values, among them `step`.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {f"model.{n}": t for n, t in model.state_dict().items()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{key}.{names[id(parameter)]}"] = value
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available() and config.device != "cpu":
        tensors["random.cuda"] = torch.cuda.get_rng_state(config.device)
    document = {"format": FORMAT, "version": 1, "config": to_dict(config), "layers": describe(model), **progress}
    write_tensors(folder, _STEM, tensors, document)


class SavedState:
    """A state read back and checked.

    Args:
        folder: written by `save_state`.

    Raises:
        CheckpointError: missing, damaged, or of another format.
    """

    def __init__(self, folder: Path) -> None:
        self._stored: StoredTensors = read_tensors(folder, _STEM)
        if self.document.get("format") != FORMAT:
            raise CheckpointError(f"{folder}: expected format {FORMAT!r}, got {self.document.get('format')!r}.")
        self._tensors: dict[str, Tensor] = {}

    @property
    def document(self) -> dict[str, Any]:
        """Configuration, structure and progress."""
        return self._stored.document

    @property
    def config(self) -> RunConfig:
        """Configuration of the run."""
        return from_dict(self.document["config"])

    def restore_model_(self, model: nn.Module) -> None:
        """Gives the model (rebuilt, on the meta device) its tensors."""
        self._tensors = self._stored.load()
        prefix = "model."
        state = {n.removeprefix(prefix): t for n, t in self._tensors.items() if n.startswith(prefix)}
        frozen = {n: p.requires_grad for n, p in model.named_parameters()}
        model.load_state_dict(state, assign=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen[name])

    def restore_optimizer_(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Gives the optimizer its moments, then the process its random state. Call last."""
        parameters = dict(model.named_parameters())
        for full, tensor in self._tensors.items():
            if full.startswith("optimizer."):
                _, key, name = full.split(".", 2)
                parameter = parameters[name]
                placed = tensor if key == "step" else tensor.to(parameter.device)
                optimizer.state[parameter][key] = placed
        torch.set_rng_state(self._tensors["random.cpu"])
        if "random.cuda" in self._tensors:
            torch.cuda.set_rng_state(self._tensors["random.cuda"], self.config.device)
        self._tensors = {}
