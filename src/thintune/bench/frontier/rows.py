"""The rows of `thintune bench frontier`, as data, and the learning rates each is tuned over."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from thintune.bench.frontier.settings import PAPER_RATES, FrontierSettings
from thintune.bench.shared import matching
from thintune.config import GaloreConfig, LoraConfig, Method, RunConfig, ThinConfig

_WEIGHTS = (1e-5, 3e-5, 1e-4)
"""Rates for methods that move the weights themselves."""
_ADAPTERS = (3e-4, 1e-3, 3e-3)
"""Rates for adapters, which start at zero, and for the head alone."""


@dataclass(frozen=True)
class FrontierRow:
    """One setting of one method.

    Attributes:
        name: of the row.
        method: of `thintune train`.
        rates: learning rates of its sweep under the preset `short`.
        thin: settings of the part `thin`.
        lora: settings of the part `lora`.
        galore: settings of the part `galore`.
    """

    name: str
    method: Method
    rates: tuple[float, ...] = _WEIGHTS
    thin: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    galore: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether this is thintune's own method, which all others are compared with."""
        return self.method == "thin"

    def config(self, settings: FrontierSettings, learning_rate: float, seed: int) -> RunConfig:
        """The configuration of one run."""
        return RunConfig(
            method=self.method,
            model=settings.model,
            data=settings.data,
            train=settings.train_config(learning_rate, seed),
            thin=ThinConfig(**self.thin),
            lora=LoraConfig(**self.lora),
            galore=GaloreConfig(**self.galore),
            threads=settings.threads,
        )


def all_rows() -> list[FrontierRow]:
    """Every row, in the order of the table."""
    return [*_peers(), *_published(), *_thin()]


def select_rows(patterns: str) -> list[FrontierRow]:
    """The rows whose name one of the patterns matches, in the order of the table.

    Args:
        patterns: shell patterns with commas between.

    Raises:
        ConfigError: a pattern that matches no row, or none given.
    """
    rows = all_rows()
    found = matching(patterns, [row.name for row in rows])
    return [row for row in rows if row.name in found]


def first_rates(row: FrontierRow, settings: FrontierSettings) -> tuple[float, ...]:
    """The rates a row's sweep begins with."""
    return settings.learning_rates or (PAPER_RATES if settings.preset == "paper" else row.rates)


def next_rate(rate: float, *, up: bool) -> float:
    """The neighbour of a rate on the grid 1, 3, 10, 30, ... (of any rate: about 3 times more or less).

    >>> next_rate(3e-5, up=True), next_rate(1e-4, up=False)
    (0.0001, 3e-05)
    """
    power = math.floor(math.log10(rate) + 1e-9)
    digit = round(rate / 10.0**power, 6)
    if digit == 1:
        return float(f"3e{power}") if up else float(f"3e{power - 1}")
    if digit == 3:
        return float(f"1e{power + 1}") if up else float(f"1e{power}")
    return rate * math.sqrt(10) if up else rate / math.sqrt(10)


def _peers() -> Iterator[FrontierRow]:
    yield FrontierRow("dense", "dense")
    yield FrontierRow("head", "head", _ADAPTERS)
    for rank in (4, 16, 64):
        yield FrontierRow(f"lora-r{rank}", "lora", _ADAPTERS, lora={"rank": rank, "alpha": float(rank)})
    yield FrontierRow("lora_fa-r16", "lora_fa", _ADAPTERS, lora={"rank": 16, "alpha": 16.0})
    yield FrontierRow("galore-r64", "galore", _WEIGHTS, galore={"rank": 64, "scale": 2.0})
    for kept in (0.6, 0.4):
        lora = {"rank": 16, "alpha": 16.0}
        yield FrontierRow(f"svd_lora-{kept}", "svd_lora", _ADAPTERS, thin={"kept": kept}, lora=lora)


def _published() -> Iterator[FrontierRow]:
    inputs = {"activation_explained_variance": 0.8}
    yield FrontierRow("amc-0.8", "amc", thin=inputs)
    yield FrontierRow("asi-0.8", "asi", thin=inputs)
    for share in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        yield FrontierRow(f"wsi-{share}", "wsi", thin={"explained_variance": share})
    for share in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9):  # the paper takes one share for weights and inputs
        both = {"explained_variance": share, "activation_explained_variance": share}
        yield FrontierRow(f"wasi-{share}", "wasi", thin=both)


_BEST: dict[str, Any] = {"rank_allocation": "sensitivity", "output_weighting": "gradient"}
"""What docs/decisions/009 recommends where accuracy comes first."""
_ABLATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "allocation": {"rank_allocation": "sensitivity"},
    "weighting": {"output_weighting": "gradient"},
    "reconstruction": {**_BEST, "reconstruction_steps": 60},
    "r16": {**_BEST, "activation_rank": 16},
    "r96": {**_BEST, "activation_rank": 96},
    "bf16": {**_BEST, "factor_dtype": "bfloat16"},
}


def _thin() -> Iterator[FrontierRow]:
    for kept in (0.6, 0.4, 0.25, 0.15):
        yield FrontierRow(f"thin-{kept}", "thin", thin={"kept": kept, **_BEST})
    for kept in (0.4, 0.25):
        for name, options in _ABLATIONS.items():
            yield FrontierRow(f"thin-{kept}-{name}", "thin", thin={"kept": kept, **options})
