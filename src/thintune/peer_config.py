"""Configuration of the methods that thintune is compared with; part of `thintune.config`."""

from __future__ import annotations

from dataclasses import dataclass

from thintune.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with this message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class LoraConfig:
    """The adapters of `lora`, `lora_fa` (`peft`) and `svd_lora`."""

    rank: int = 16
    """Rank of each adapter."""
    alpha: float = 16.0
    """Scale of each adapter, divided by the rank."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"lora.rank: expected at least 1, got {self.rank}.")
        require(self.alpha > 0, f"lora.alpha: expected more than 0, got {self.alpha}.")


@dataclass(frozen=True)
class GaloreConfig:
    """The subspaces of `galore` (`pytorch-optimizer`)."""

    rank: int = 64
    """Directions of each gradient in which the optimizer works; smaller matrices are trained whole."""
    update_gap: int = 200
    """Optimizer steps between two singular value decompositions of the gradients."""
    scale: float = 0.25
    """Factor on every projected update; the authors take 0.25 to pre-train, at large rates, and 2 to 4 to fine-tune."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"galore.rank: expected at least 1, got {self.rank}.")
        require(self.update_gap >= 1, f"galore.update_gap: expected at least 1, got {self.update_gap}.")
        require(self.scale > 0, f"galore.scale: expected more than 0, got {self.scale}.")
