"""thintune's own methods, by the path that `thintune train` takes."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from thintune.bench.cost.peers import LEARNING_RATE, MOMENTUM, fill_head_
from thintune.bench.cost.rows import Row, reuses_memory
from thintune.bench.cost.settings import CostSettings
from thintune.config import DataConfig, Method, ModelConfig, RunConfig, ThinConfig, TrainConfig
from thintune.data import Splits
from thintune.optim import ThinStep, build_optimizer
from thintune.train.loop import Loop
from thintune.train.prepare import build

CALIBRATION_IMAGES = 32
"""Enough for a conversion of random weights: what a row takes does not depend on their values."""


class Ours:
    """A model of thintune and its optimizer step."""

    def __init__(self, config: RunConfig, splits: Splits) -> None:
        self.model: nn.Module
        self.model, _ = build(config, splits)
        fill_head_(self.model)
        self._optimizer = build_optimizer(self.model, config.train)
        thin = config.thin
        self._thin_step = ThinStep(self.model, self._optimizer, refresh_every=thin.refresh_every)
        self._thin_step.restore_(thin.refresh_every - 1)  # the warm-up step moves the bases: the peak knows of it
        self._loop = Loop(self.model, self._optimizer, self._thin_step, splits.train, config.train, config.device)

    def step(self, rows: Tensor) -> None:
        """One optimizer step on the images of these rows."""
        self._loop.step(rows)


def data_config(settings: CostSettings) -> DataConfig:
    """Random images: as many as the batch, at least 64."""
    return DataConfig(
        name="synthetic",
        image_size=settings.image_size,
        synthetic_images=max(settings.batch_size, 64),
        synthetic_classes=settings.classes,
        val_fraction=0.0,
        split_seed=settings.seed,
    )


def run_config(row: Row, settings: CostSettings, model: ModelConfig) -> RunConfig:
    """The run that a row of thintune stands for: SGD with momentum, every layer stepped as soon as it can be.

    Args:
        row: of thintune's own.
        settings: of the bench.
        model: with the dense file, or for `thin` the folder of a thin checkpoint.
    """
    assert row.method not in ("lora", "galore")
    method: Method = row.method
    thin = ThinConfig(
        kept=row.kept if row.method in ("wsi", "wasi") else None,
        factor_dtype=row.factor_dtype,
        calibration_images=CALIBRATION_IMAGES,
    )
    return RunConfig(method, model, data_config(settings), _train_config(settings, row.micro_batch), thin)


def conversion_config(kept: float, settings: CostSettings, model: ModelConfig) -> RunConfig:
    """The run whose start makes the thin checkpoint that the rows of `thin` load."""
    thin = ThinConfig(kept=kept, calibration_images=CALIBRATION_IMAGES)
    return RunConfig("thin", model, data_config(settings), _train_config(settings, None), thin)


def _train_config(settings: CostSettings, micro_batch: int | None) -> TrainConfig:
    return TrainConfig(
        epochs=settings.steps + 1,
        batch_size=settings.batch_size,
        micro_batch=micro_batch,
        optimizer="sgd",
        learning_rate=LEARNING_RATE,
        momentum=MOMENTUM,
        weight_decay=0.0,
        warmup_fraction=0.0,
        clip_norm=None,
        layerwise_update=True,
        reuse_memory=reuses_memory(micro_batch),
        seed=settings.seed,
    )


def thin_folder(prepared: Path, kept: float) -> Path:
    """Where the thin checkpoint of a kept share lies."""
    return prepared / f"thin-{kept}"
