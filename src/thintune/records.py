"""The record that every run leaves: flat JSON, null for what could not be measured."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 1

Status = Literal["completed", "interrupted", "failed"]


@dataclass
class RunRecord:
    """One training run. Bytes, seconds and FLOPs are measured in the process that ran it."""

    schema_version: int = SCHEMA_VERSION
    status: Status = "failed"
    error: str | None = None
    """Why a run failed, or null."""
    diverged: bool = False
    """Whether it failed by a loss or a gradient that is not finite."""
    method: str = ""
    model: str = ""
    model_options: dict[str, Any] = field(default_factory=dict)
    model_checkpoint: str | None = None
    dataset: str = ""
    image_size: int = 0
    seed: int = 0
    optimizer: str = ""
    learning_rate: float = 0.0
    batch_size: int = 0
    micro_batch: int = 0
    epochs: int = 0
    steps: int = 0
    """Optimizer steps done, over all processes of a resumed run."""
    train_images: int = 0
    head_val_accuracy: float | None = None
    """Validation accuracy with the fitted head, before training; null where no head was fitted."""
    val_accuracy: float | None = None
    test_accuracy: float | None = None
    train_loss: float | None = None
    """Mean loss of the last epoch's steps."""
    kept_weight_fraction: float | None = None
    """Share of the converted linear layers' weights that is left."""
    explained_variance: float | None = None
    parameter_bytes: int | None = None
    """Parameters of the model as trained."""
    checkpoint_bytes: int | None = None
    """Tensor file of the model as shipped."""
    baseline_rss_bytes: int | None = None
    """Resident memory after imports, before anything was built."""
    peak_rss_bytes: int | None = None
    """High-water mark of resident memory over the whole process, loading and evaluation included."""
    peak_above_baseline_bytes: int | None = None
    train_peak_above_baseline_bytes: int | None = None
    """The same up to the end of training, before the final evaluation."""
    saved_activation_bytes: int | None = None
    """Bytes autograd holds at the end of one micro-batch's forward pass, parameters and buffers excluded."""
    step_time_s_median: float | None = None
    step_time_s_iqr: float | None = None
    images_per_s: float | None = None
    train_flops_per_step: int | None = None
    """FLOPs of matrix products and convolutions in one optimizer step; a multiply-add is 2."""
    inference_images_per_s: float | None = None
    prepare_time_s: float | None = None
    """Loading, calibration, conversion and fitting of the head."""
    duration_s: float | None = None
    resumed: bool = False
    """Whether this process continued an earlier one; memory and times are then those of this process."""
    threads: int = 0
    device: str = "cpu"
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    date: str = ""
    git_commit: str | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Indented JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"
