"""Training that starts from a thin checkpoint: no dense weight of a thin layer is ever made."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from thintune.config import RunConfig
from thintune.errors import CheckpointError, ConfigError
from thintune.io import Checkpoint, find_checkpoint, load_checkpoint_
from thintune.train.models import build_model, classifier_name, start_head_

_DECIDED = ("kept", "explained_variance", "rank", "include_modules", "exclude_modules")


def thin_folder(config: RunConfig) -> Path | None:
    """The folder of the checkpoint to start from, or None where the run does not start from a folder."""
    path = None if config.model.checkpoint is None else Path(config.model.checkpoint)
    return path if path is not None and path.is_dir() else None


def load_thin(config: RunConfig, folder: Path, classes: int) -> nn.Module:
    """Fills the empty model from a thin checkpoint; its head is kept where it has the right number of classes.

    Args:
        config: of the run.
        folder: of the checkpoint, or of the run that wrote it.
        classes: outputs of the head.

    Raises:
        ConfigError: another method than `thin`, or a setting that the checkpoint has decided.
        CheckpointError: damaged, without thin layers, or of another architecture.
    """
    if config.method != "thin":
        raise ConfigError(
            f"method: expected thin, to start from the checkpoint folder {folder}, got {config.method!r}, which starts "
            "from a safetensors file of dense weights."
        )
    given = [f"thin.{name}" for name in _DECIDED if getattr(config.thin, name)]
    if given:
        raise ConfigError(f"{' and '.join(given)}: decided by the thin checkpoint {folder} already; leave it out.")
    checkpoint = find_checkpoint(folder)
    if not checkpoint.thin_layers:
        raise CheckpointError(
            f"model.checkpoint: {folder}: expected thin layers, found none; to convert its dense weights, pass "
            f"{checkpoint.stored.path}."
        )
    _check_info(config, checkpoint)
    model = build_model(config.model, classes, config.data.image_size, empty=True)
    head = classifier_name(model)
    shape = checkpoint.stored.open().shapes().get(f"{head}.weight")
    fits = shape is not None and shape[0] == classes
    load_checkpoint_(model, checkpoint, leave=() if fits else (head,))
    start_head_(model)
    return model


def _check_info(config: RunConfig, checkpoint: Checkpoint) -> None:
    """Says in the user's terms what would show as tensors of other shapes."""
    made = checkpoint.info.get("config")
    if not isinstance(made, dict):
        return
    for part, name in (("model", "name"), ("data", "image_size")):
        theirs, ours = made.get(part, {}).get(name), getattr(getattr(config, part), name)
        if theirs not in (None, ours):
            raise CheckpointError(
                f"model.checkpoint: {config.model.checkpoint}: made for another architecture, with {part}.{name} "
                f"{theirs}, not {ours}."
            )
