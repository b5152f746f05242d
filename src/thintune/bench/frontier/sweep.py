"""Which run of a row comes next: rates on the validation split first, then the other seeds at the best rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from thintune.bench.frontier.rows import FrontierRow, first_rates, next_rate
from thintune.bench.frontier.settings import FrontierSettings

Cells = Mapping[tuple[float, int], Mapping[str, Any]]
"""What is known of a row, by learning rate and seed."""


@dataclass(frozen=True)
class Sweep:
    """Where a row's choice of the learning rate stands."""

    tried: tuple[float, ...]
    missing: tuple[float, ...]
    """Rates to be tried next; empty where the choice is made."""
    best: float | None
    """The rate of the highest validation accuracy, the lower one of two equals; None if not chosen, or none works."""


def sweep(row: FrontierRow, cells: Cells, settings: FrontierSettings) -> Sweep:
    """Reads off the cells of seed 0 how far the sweep is; the test split has no part in it."""
    rates = sorted(first_rates(row, settings))
    extensions = settings.extensions if len(rates) > 1 else 0
    while True:
        missing = tuple(rate for rate in rates if (rate, 0) not in cells)
        if missing:
            return Sweep(tuple(rates), missing, None)
        scores = {rate: _score(cells[rate, 0]) for rate in rates}
        best = max(rates, key=lambda rate: (scores[rate], -rate))
        if not extensions or best not in (rates[0], rates[-1]):
            return Sweep(tuple(rates), (), best if scores[best] >= 0 else None)
        extensions -= 1
        rates = sorted({*rates, next_rate(best, up=best == rates[-1])})


def _score(cell: Mapping[str, Any]) -> float:
    """Validation accuracy; below every accuracy where the run diverged."""
    return cell["record"]["val_accuracy"] if cell["status"] == "completed" else -1.0


@dataclass(frozen=True)
class Task:
    """One process to run: training, or a checkpoint's one look at the test split."""

    row: FrontierRow
    rate: float
    seed: int
    test: bool = False


def next_task(row: FrontierRow, cells: Cells, settings: FrontierSettings) -> Task | None:
    """The next process of a row, or None where nothing is left to do."""
    found = sweep(row, cells, settings)
    if found.missing:
        return Task(row, found.missing[0], 0)
    if found.best is None:
        return None
    for seed in range(settings.seeds):
        cell = cells.get((found.best, seed))
        if cell is None:
            return Task(row, found.best, seed)
        if cell["status"] == "completed" and cell["test"] is None:
            return Task(row, found.best, seed, test=True)
    return None


def trainings_left(row: FrontierRow, cells: Cells, settings: FrontierSettings) -> int:
    """How many trainings of a row are to come, if its sweep needs no further rate."""
    found = sweep(row, cells, settings)
    if found.missing:
        return len(found.missing) + settings.seeds - 1
    return 0 if found.best is None else sum((found.best, seed) not in cells for seed in range(settings.seeds))
