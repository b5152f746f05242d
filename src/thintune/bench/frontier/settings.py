"""What `thintune bench frontier` is asked for: one frozen dataclass, which is also its flags and its record."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from thintune.config import DataConfig, ModelConfig, TrainConfig
from thintune.errors import ConfigError, nearest

Preset = Literal["short", "paper"]
PRESETS: dict[str, dict[str, Any]] = {
    "short": {"epochs": 3, "batch_size": 128, "optimizer": "adamw", "weight_decay": 0.01, "clip_norm": 1.0},
    "paper": {
        "epochs": 50,
        "batch_size": 128,
        "optimizer": "sgd",
        "momentum": 0.0,
        "weight_decay": 1e-4,
        "warmup_fraction": 0.0,
        "clip_norm": 2.0,
    },
}
"""Training settings by name; `paper` is the protocol of arXiv 2510.09160 (SGD, cosine schedule, clipping at 2)."""
PAPER_RATES = (0.05,)
"""The learning rate of `paper`: one for all methods, not tuned."""


@dataclass(frozen=True)
class FrontierSettings:
    """One task, and which methods, rates and seeds are run on it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Which model is trained."""
    data: DataConfig = field(default_factory=DataConfig)
    """Which images are read and how they are split."""
    preset: Preset = "short"
    """short: AdamW, 3 epochs, rates tuned on the validation split; paper: arXiv 2510.09160, SGD 0.05, 50 epochs."""
    epochs: int | None = None
    """Passes over the training images, in place of the preset's."""
    batch_size: int | None = None
    """Images of an optimizer step, in place of the preset's."""
    micro_batch: int | None = None
    """Images of one forward and backward pass, for every method; default: the batch."""
    max_steps: int | None = None
    """Stop every run after this many optimizer steps."""
    rows: str = "*"
    """Which rows, as shell patterns of their names with commas between: 'dense,lora-*,thin-0.4'."""
    learning_rates: tuple[float, ...] = ()
    """Rates tried for every row; empty: those of the row, or the preset's."""
    extensions: int = 2
    """How often a sweep goes one rate further while its best one is the lowest or the highest tried."""
    seeds: int = 3
    """Seeds of every row at its best rate: 0, 1, ...; the sweep is run with seed 0."""
    threads: int | None = None
    """CPU threads; default: all that torch finds."""
    timeout_s: float | None = None
    """Stop a run after this many seconds; default: never."""

    def __post_init__(self) -> None:
        if self.preset not in get_args(Preset):
            names = get_args(Preset)
            raise ConfigError(
                f"preset: expected one of {', '.join(names)}, got {self.preset!r}.{nearest(self.preset, names)}"
            )
        for name in ("seeds", "epochs", "batch_size", "micro_batch", "max_steps", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}.")
        if self.extensions < 0:
            raise ConfigError(f"extensions: expected at least 0, got {self.extensions}.")
        if any(rate <= 0 for rate in self.learning_rates):
            raise ConfigError(f"learning_rates: expected numbers above 0, got {list(self.learning_rates)}.")
        if self.timeout_s is not None and self.timeout_s <= 0:
            raise ConfigError(f"timeout_s: expected more than 0, got {self.timeout_s}.")
        if not self.data.val_fraction:
            raise ConfigError("data.val_fraction: expected more than 0: rates are chosen on the validation split.")
        object.__setattr__(self, "learning_rates", tuple(sorted(set(self.learning_rates))))
        self.train_config(1e-3, 0)  # what it refuses is refused before anything runs

    def train_config(self, learning_rate: float, seed: int) -> TrainConfig:
        """The training part of one run: the preset, what replaces it, and no look at the test split."""
        asked = {"epochs": self.epochs, "batch_size": self.batch_size}
        return TrainConfig(
            **{**PRESETS[self.preset], **{name: value for name, value in asked.items() if value is not None}},
            micro_batch=self.micro_batch,
            max_steps=self.max_steps,
            learning_rate=learning_rate,
            seed=seed,
            evaluate_test=False,
            checkpoint_every=0,
        )


def frontier_to_dict(settings: FrontierSettings) -> dict[str, Any]:
    """Nested dictionaries of JSON values."""
    document = dataclasses.asdict(settings)
    return {**document, "learning_rates": list(settings.learning_rates)}


def frontier_from_dict(document: dict[str, Any]) -> FrontierSettings:
    """Rebuilds settings from `frontier_to_dict`."""
    parts = {"model": ModelConfig(**document["model"]), "data": DataConfig(**document["data"])}
    return FrontierSettings(**{**document, **parts})
