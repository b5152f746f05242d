"""A checkpoint back to a model, and its accuracy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thintune.config import RunConfig, from_dict
from thintune.errors import CheckpointError, ConfigError
from thintune.io import Checkpoint, find_checkpoint, load_checkpoint_
from thintune.train.evaluate import evaluate
from thintune.train.models import build_model
from thintune.train.prepare import check_device, load_data


@dataclass(frozen=True)
class CheckpointResult:
    """What a checkpoint reaches on its test split."""

    accuracy: float
    images: int
    images_per_s: float
    checkpoint_bytes: int


def reload(checkpoint: Checkpoint) -> tuple[nn.Module, RunConfig]:
    """Rebuilds the model that a run saved, on the CPU; no dense weight of a thin layer is ever made.

    Raises:
        CheckpointError: not written by a training run, or of another architecture.
    """
    info = checkpoint.info
    if not {"config", "classes", "batch_size"} <= info.keys():
        raise CheckpointError(
            f"{checkpoint.stored.path.parent}: was not written by a training run; use thintune.load_checkpoint_."
        )
    config = from_dict(info["config"])
    source = dataclasses.replace(config.model, checkpoint=None, pretrained=False)
    model = load_checkpoint_(build_model(source, info["classes"], config.data.image_size, empty=True), checkpoint)
    return model.eval(), config


def evaluate_checkpoint(
    path: Path, device: str, changes: Mapping[str, Any], threads: int | None = None
) -> CheckpointResult:
    """Measures a checkpoint on the test split of its run.

    Args:
        path: checkpoint folder or run folder.
        device: cpu or cuda.
        changes: fields of the data configuration to replace.
        threads: of torch, in this process from here on; None leaves them as they are.

    Raises:
        ConfigError: a device that is not there, or threads below 1.
        CheckpointError: no checkpoint of a run.
    """
    check_device(device)
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"--threads: expected at least 1, got {threads}.")
        torch.set_num_threads(threads)
    checkpoint = find_checkpoint(path)
    model, config = reload(checkpoint)
    data = dataclasses.replace(config.data, **changes)
    splits = load_data(config.model, data)
    found = evaluate(model.to(device), splits.test, int(checkpoint.info["batch_size"]), device)
    assert found.accuracy is not None and found.images_per_s is not None
    return CheckpointResult(found.accuracy, len(splits.test), found.images_per_s, checkpoint.size_bytes)
