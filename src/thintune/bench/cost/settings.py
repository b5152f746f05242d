"""What `thintune bench cost` is asked for: one frozen dataclass, which is also its flags and its record."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from thintune.config import ModelConfig
from thintune.errors import ConfigError

_UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_LIMIT = re.compile(r"(?P<baseline>baseline\+)?(?P<number>\d+(?:\.\d+)?) ?(?P<unit>[A-Za-z]*)")


@dataclass(frozen=True)
class Limit:
    """A hard limit of the kernel on a row's memory."""

    above_baseline: bool
    """Whether what the imported libraries take comes on top."""
    size_bytes: int


def parse_limit(text: str) -> Limit:
    """Reads `BYTES`, `600MB`, `0.5GiB` or `baseline+290MB`.

    Raises:
        ConfigError: anything else.
    """
    found = _LIMIT.fullmatch(text.strip())
    if found is None or found["unit"] not in _UNITS or not float(found["number"]):
        raise ConfigError(
            f"limit: expected bytes, as 629145600, 600MB, 0.5GiB or baseline+290MB, got {text!r}; units are "
            f"{', '.join(filter(None, _UNITS))}."
        )
    return Limit(found["baseline"] is not None, round(float(found["number"]) * _UNITS[found["unit"]]))


@dataclass(frozen=True)
class CostSettings:
    """What is trained and how often it is measured."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(name="timm:vit_base_patch16_224"))
    """Which model is trained; its weights are random unless a dense file or pretrained is given."""
    image_size: int = 224
    """Height and width in pixels of the synthetic images."""
    classes: int = 100
    """Outputs of the head."""
    batch_size: int = 128
    """Images of an optimizer step, in every row."""
    steps: int = 1
    """Timed optimizer steps of a row, after a warm-up step on two micro-batches."""
    repeats: int = 3
    """Fresh processes of each row; the rows take turns."""
    rows: str = "*"
    """Which rows, as shell patterns of their names with commas between: 'dense-mb*,thin-0.4-mb4'."""
    limit: str | None = None
    """Run every row under this hard memory limit of the kernel: 600MB, 0.5GiB, or baseline+290MB."""
    threads: int | None = None
    """CPU threads; default: all that torch finds."""
    timeout_s: float | None = None
    """Stop a row's process after this many seconds; default: never."""
    seed: int = 0
    """Seed of weights and images."""

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size", "steps", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}.")
        if self.classes < 2:
            raise ConfigError(f"classes: expected at least 2, got {self.classes}.")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads: expected at least 1, got {self.threads}.")
        if self.timeout_s is not None and self.timeout_s <= 0:
            raise ConfigError(f"timeout_s: expected more than 0, got {self.timeout_s}.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed: expected a number in [0, 2^63), got {self.seed}.")
        if self.limit is not None:
            parse_limit(self.limit)


def settings_to_dict(settings: CostSettings) -> dict[str, Any]:
    """Nested dictionaries of JSON values."""
    return dataclasses.asdict(settings)


def settings_from_dict(document: dict[str, Any]) -> CostSettings:
    """Rebuilds settings from `settings_to_dict`."""
    return CostSettings(**{**document, "model": ModelConfig(**document["model"])})
