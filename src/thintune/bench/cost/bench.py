"""`thintune bench cost`: every row in a fresh process, the rows taking turns, one JSON file for each."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from thintune.bench.cost.rows import Row, select_rows
from thintune.bench.cost.settings import CostSettings, parse_limit, settings_to_dict
from thintune.bench.cost.table import cost_table, to_markdown
from thintune.bench.limits import LimitNotPermittedError, MemoryGroup, why_not_permitted
from thintune.bench.process import Outcome, forget_file_pages, run_worker
from thintune.bench.shared import keep_settings
from thintune.errors import ThintuneError
from thintune.io import prepare_directory, read_document, write_text
from thintune.measure import provenance

SCHEMA_VERSION = 1
_MAY_CHANGE = ("rows", "repeats", "timeout_s")
_LIBRARIES = {"lora": "peft", "galore": "pytorch-optimizer"}


class CostDisplay(Protocol):
    """What the bench tells while it runs."""

    def say(self, text: str) -> None:
        """One line."""

    def start(self, total: int, done: int) -> None:
        """The rows begin."""

    def begin(self, name: str) -> None:
        """A process begins."""

    def end(self, cell: dict[str, Any], left_s: float | None) -> None:
        """A process has ended; so long the others may take."""

    def stop(self) -> None:
        """The rows are over."""


def run_cost(settings: CostSettings, out: Path, display: CostDisplay) -> dict[str, Any]:
    """Runs what is missing in `out` and writes `table.json` and `table.md` there.

    Args:
        settings: of the bench; `out` may hold cells of the same settings, with other rows or repeats.
        out: folder of the bench, made if need be.
        display: told about progress.

    Returns:
        The document of `table.json`.

    Raises:
        ConfigError: a row that does not exist, or cells of other settings in `out`.
        ThintuneError: the model could not be prepared.
    """
    return _CostBench(settings, out, display).run()


class _CostBench:
    def __init__(self, settings: CostSettings, out: Path, display: CostDisplay) -> None:
        self.settings, self.out, self.display = settings, out, display
        self.rows = select_rows(settings.rows, settings.batch_size)
        self.prepared = out / "prepared"
        self.not_limited: str | None = None
        self._baselines: dict[str, int] = {}

    def run(self) -> dict[str, Any]:
        prepare_directory(self.out / "cells")
        keep_settings(self.out, settings_to_dict(self.settings), _MAY_CHANGE)
        if self.settings.limit is not None:
            self.not_limited = why_not_permitted()
            if self.not_limited is not None:
                self.display.say(f"limit: not permitted here, rows run without it: {self.not_limited}")
        todo = [(row, number) for row, number in self._turns() if self._cell(row, number) is None]
        total = len(self.rows) * self.settings.repeats
        if todo:
            self._prepare({row.kept for row, _ in todo if row.method == "thin" and row.kept is not None})
        self.display.start(total, total - len(todo))
        try:
            for place, (row, number) in enumerate(todo):
                self.display.begin(f"{row.name}, {number + 1} of {self.settings.repeats}")
                cell = self._measure(row, number)
                write_text(self._path(row, number), json.dumps(cell, indent=2, allow_nan=False) + "\n")
                self.display.end(cell, seconds_left(self._durations(), [r.name for r, _ in todo[place + 1 :]]))
        finally:
            self.display.stop()
            document = self._write_table()
        return document

    def _turns(self) -> list[tuple[Row, int]]:
        """Every row once a round, each round beginning one further."""
        turns = []
        for number in range(self.settings.repeats):
            start = number % len(self.rows)
            turns += [(row, number) for row in self.rows[start:] + self.rows[:start]]
        return turns

    def _path(self, row: Row, number: int) -> Path:
        return self.out / "cells" / f"{row.name}.{number}.json"

    def _cell(self, row: Row, number: int) -> dict[str, Any] | None:
        """What has been measured before; a failed cell is run again."""
        path = self._path(row, number)
        if not path.is_file():
            return None
        cell = read_document(path)
        return None if cell.get("status") == "failed" else cell

    def _order(self, phase: str, **more: Any) -> dict[str, Any]:
        return {
            "phase": phase,
            "settings": settings_to_dict(self.settings),
            "prepared": str(self.prepared.resolve()),
            "inference": self.settings.limit is None,
            **more,
        }

    def _prepare(self, kept: set[float]) -> None:
        self.display.say(f"preparing the weights in {self.prepared}")
        outcome = run_worker(self._order("prepare", kept=sorted(kept)))
        if outcome.ending != "finished":
            raise ThintuneError(
                f"{self.settings.model.name}: could not be prepared: {outcome.error or outcome.ending}."
            )

    def _measure(self, row: Row, number: int) -> dict[str, Any]:
        order = self._order("row", row=row.name)
        limit = None if self.settings.limit is None or self.not_limited else self._limit_bytes(row)
        if limit is None:
            outcome = run_worker(order, timeout_s=self.settings.timeout_s)
        else:
            forget_file_pages(path for path in self.prepared.rglob("*") if path.is_file())
            with MemoryGroup(limit) as group:
                outcome = run_worker(order, group, self.settings.timeout_s)
        return self._new_cell(row, number, outcome, limit)

    def _limit_bytes(self, row: Row) -> int:
        """The limit in bytes; what the row's libraries take comes on top where it was asked for so."""
        assert self.settings.limit is not None
        limit = parse_limit(self.settings.limit)
        return limit.size_bytes + (self._baseline(row) if limit.above_baseline else 0)

    def _baseline(self, row: Row) -> int:
        """What the kernel counts against a process that only imports; the second one, with every file read before."""
        libraries = _LIBRARIES.get(row.method, "")
        if libraries not in self._baselines:
            found: Any = None
            for _ in range(2):
                with MemoryGroup() as group:
                    found = run_worker(self._order("baseline", row=row.name), group).found.get("baseline_charged_bytes")
            if found is None:
                raise LimitNotPermittedError("limit: the kernel does not tell what a process is charged with.")
            self._baselines[libraries] = found
        return self._baselines[libraries]

    def _new_cell(self, row: Row, number: int, outcome: Outcome, limit: int | None) -> dict[str, Any]:
        asked = self.settings.limit
        return {
            "schema_version": SCHEMA_VERSION,
            "status": outcome.ending,
            "error": outcome.error,
            "row": {
                **dataclasses.asdict(row),
                "exact_gradients": row.exact_gradients,
                "exact_accumulation": row.exact_accumulation,
            },
            "repeat": number,
            "predicted_peak_bytes": None,
            **outcome.found,
            "limit": None
            if asked is None
            else {
                "asked": asked,
                "limited": limit is not None,
                "limit_bytes": limit,
                "charged_baseline_bytes": self._baselines.get(_LIBRARIES.get(row.method, "")),
                "charged_peak_bytes": outcome.charged_peak_bytes,
                "not_limited_because": self.not_limited,
            },
            "duration_s": outcome.duration_s,
            "settings": settings_to_dict(self.settings),
            "command": provenance.command(),
            "date": provenance.date(),
            "git_commit": provenance.git_commit(),
        }

    def _cells(self) -> list[dict[str, Any]]:
        paths = [self._path(row, number) for row in self.rows for number in range(self.settings.repeats)]
        return [read_document(path) for path in paths if path.is_file()]

    def _durations(self) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for cell in self._cells():
            found.setdefault(cell["row"]["name"], []).append(cell["duration_s"])
        return found

    def _write_table(self) -> dict[str, Any]:
        document = cost_table(self._cells(), settings_to_dict(self.settings), self.not_limited)
        write_text(self.out / "table.json", json.dumps(document, indent=2, allow_nan=False) + "\n")
        write_text(self.out / "table.md", to_markdown(document))
        return document


def seconds_left(durations: dict[str, list[float]], rows: Sequence[str]) -> float | None:
    """How long the rows may take: each as its own processes before, or else as the middle one of all.

    Args:
        durations: of processes that have ended, by row.
        rows: to come; a name may occur more than once.
    """
    every = [seconds for found in durations.values() for seconds in found]
    if not every:
        return None
    return sum(statistics.median(durations.get(name, every)) for name in rows)
