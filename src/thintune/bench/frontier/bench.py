"""`thintune bench frontier`: methods x settings x seeds, each run in a fresh process, one JSON file for each."""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from thintune.bench.frontier.plots import pyplot
from thintune.bench.frontier.report import to_html
from thintune.bench.frontier.rows import FrontierRow, all_rows, select_rows
from thintune.bench.frontier.settings import FrontierSettings, frontier_to_dict
from thintune.bench.frontier.sweep import Task, next_task, sweep, trainings_left
from thintune.bench.frontier.table import frontier_table, to_csv
from thintune.bench.process import run_command
from thintune.bench.shared import keep_settings
from thintune.config import RunConfig, to_dict
from thintune.errors import CheckpointError
from thintune.io import prepare_directory, read_document, write_text
from thintune.measure import provenance

SCHEMA_VERSION = 1
_MAY_CHANGE = ("rows", "seeds", "extensions", "timeout_s")
_MOVES = ("thin", "wasi", "wsi", "asi")
"""Methods whose layers hold subspaces to follow."""


class FrontierDisplay(Protocol):
    """What the bench tells while it runs."""

    def say(self, text: str) -> None:
        """One line."""

    def start(self, total: int, done: int) -> None:
        """The runs begin."""

    def begin(self, name: str) -> None:
        """A process begins."""

    def end(self, text: str, total: int, left_s: float | None) -> None:
        """A process has ended, of so many; so long the others may take."""

    def stop(self) -> None:
        """The runs are over."""


def run_frontier(settings: FrontierSettings, out: Path, display: FrontierDisplay) -> dict[str, Any]:
    """Runs what is missing in `out` and writes `frontier.json`, `frontier.csv` and `report.html` there.

    Args:
        settings: of the bench; `out` may hold cells of the same settings, with other rows or fewer seeds.
        out: folder of the bench, made if need be.
        display: told about progress.

    Returns:
        The document of `frontier.json`.

    Raises:
        ConfigError: a row that does not exist, or cells of other settings in `out`.
        MissingDependencyError: no matplotlib for the report.
    """
    pyplot()  # what the report needs is missed before the runs, not after them
    return _FrontierBench(settings, out, display).run()


class _FrontierBench:
    def __init__(self, settings: FrontierSettings, out: Path, display: FrontierDisplay) -> None:
        self.settings, self.out, self.display = settings, out, display
        self.rows = select_rows(settings.rows)
        self.cells: dict[str, dict[tuple[float, int], dict[str, Any]]] = {}
        self.failed: set[str] = set()

    def run(self) -> dict[str, Any]:
        prepare_directory(self.out / "cells")
        keep_settings(self.out, frontier_to_dict(self.settings), _MAY_CHANGE)
        self.cells = {row.name: dict(self._read(row)) for row in self.rows}
        self.display.start(self._total(), self._done())
        try:
            for task in self._turns():
                self._run(task)
        finally:
            self.display.stop()
            document = self._write()
        return document

    def _turns(self) -> Iterator[Task]:
        """Every row takes its next step in turn, so that a slow hour of the machine hits all of them."""
        while True:
            tasks = [next_task(row, self.cells[row.name], self.settings) for row in self.rows]
            todo = [task for task in tasks if task is not None and task.row.name not in self.failed]
            if not todo:
                return
            yield from todo

    def _name(self, row: FrontierRow, rate: float, seed: int) -> str:
        return f"{row.name}.lr{rate:g}.seed{seed}"

    def _run_folder(self, task: Task) -> Path:
        return self.out / "runs" / self._name(task.row, task.rate, task.seed)

    def _read(self, row: FrontierRow) -> Iterator[tuple[tuple[float, int], dict[str, Any]]]:
        """What has been run before; a failed run is run again."""
        for path in sorted((self.out / "cells").glob(f"{row.name}.lr*.seed*.json")):
            cell = read_document(path)
            if cell.get("status") != "failed":
                yield (cell["learning_rate"], cell["seed"]), cell

    def _run(self, task: Task) -> None:
        name = self._name(task.row, task.rate, task.seed)
        if task.test and not (self._run_folder(task) / "checkpoint").is_dir():
            task = dataclasses.replace(task, test=False)  # somebody removed the checkpoint: train it again
        self.display.begin(f"{name}, {'test' if task.test else 'training'}")
        cell = self._test(task) if task.test else self._train(task)
        write_text(self.out / "cells" / f"{name}.json", json.dumps(cell, indent=2, allow_nan=False) + "\n")
        self.cells[task.row.name][task.rate, task.seed] = cell
        if cell["status"] == "failed":
            self.failed.add(task.row.name)
        self._tidy(task.row)
        if not task.test or cell["status"] == "failed":
            self.display.end(self._line(name, cell), self._total(), self._left())

    def _train(self, task: Task) -> dict[str, Any]:
        config, folder = self._config(task), self._run_folder(task)
        prepare_directory(folder)
        asked = folder / "config.json"  # JSON is YAML
        write_text(asked, json.dumps(to_dict(config), indent=2) + "\n")
        words = [sys.executable, "-m", "thintune", "train", "--config", str(asked), "--out", str(folder), "--overwrite"]
        outcome = run_command(words, self.settings.timeout_s)
        if outcome.interrupted:
            raise KeyboardInterrupt
        record = self._document(folder / "record.json")
        diverged = bool(record and record.get("diverged"))
        completed = outcome.ending == "finished" and record is not None and record["status"] == "completed"
        return {
            "schema_version": SCHEMA_VERSION,
            "status": "completed" if completed else "diverged" if diverged else "failed",
            "error": None if completed else outcome.error or outcome.ending,
            "row": dataclasses.asdict(task.row),
            "learning_rate": task.rate,
            "seed": task.seed,
            "record": record,
            "test": None,
            "subspaces": self._document(folder / "subspaces.json") if config.train.track_subspaces else None,
            "duration_s": outcome.duration_s,
            "settings": frontier_to_dict(self.settings),
            "command": provenance.command(),
            "date": provenance.date(),
            "git_commit": provenance.git_commit(),
        }

    def _config(self, task: Task) -> RunConfig:
        config = task.row.config(self.settings, task.rate, task.seed)
        last = task.seed == self.settings.seeds - 1  # one seed is followed; medians of memory hold two that are not
        follow = last and task.row.method in _MOVES
        return dataclasses.replace(config, train=dataclasses.replace(config.train, track_subspaces=follow))

    def _test(self, task: Task) -> dict[str, Any]:
        """The one look at the test split, by a process that only reads the checkpoint."""
        cell = dict(self.cells[task.row.name][task.rate, task.seed])
        words = [sys.executable, "-m", "thintune", "eval", str(self._run_folder(task)), "--json"]
        words += [] if self.settings.threads is None else ["--threads", str(self.settings.threads)]
        outcome = run_command(words, self.settings.timeout_s)
        if outcome.interrupted:
            raise KeyboardInterrupt
        if outcome.ending == "finished":
            cell["test"] = json.loads(outcome.output)
        else:
            cell |= {"status": "failed", "error": outcome.error or outcome.ending}
        return cell

    def _tidy(self, row: FrontierRow) -> None:
        """Removes the files of runs whose checkpoints nobody needs any more."""
        cells = self.cells[row.name]
        found = sweep(row, cells, self.settings)
        if found.missing:
            return
        for (rate, seed), cell in cells.items():
            if rate != found.best or cell["test"] is not None:
                shutil.rmtree(self.out / "runs" / self._name(row, rate, seed), ignore_errors=True)

    def _document(self, path: Path) -> dict[str, Any] | None:
        try:
            return read_document(path)
        except CheckpointError:
            return None

    def _line(self, name: str, cell: dict[str, Any]) -> str:
        record = cell["record"] or {}
        words = [name, cell["status"]]
        words += [] if record.get("val_accuracy") is None else [f"validation accuracy {record['val_accuracy']:.4f}"]
        words += [] if cell["error"] is None else [cell["error"]]
        return ", ".join(words)

    def _done(self) -> int:
        return sum(len(cells) for cells in self.cells.values())

    def _remaining(self) -> dict[str, int]:
        rows = (row for row in self.rows if row.name not in self.failed)
        return {row.name: trainings_left(row, self.cells[row.name], self.settings) for row in rows}

    def _total(self) -> int:
        return self._done() + sum(self._remaining().values())

    def _left(self) -> float | None:
        """Seconds that the trainings to come may take: each as its row's before, or else as the middle one of all."""
        times = {name: [c["duration_s"] for c in cells.values()] for name, cells in self.cells.items()}
        every = [seconds for found in times.values() for seconds in found]
        if not every:
            return None
        return sum(count * statistics.median(times[name] or every) for name, count in self._remaining().items())

    def _write(self) -> dict[str, Any]:
        asked = {row.name for row in self.rows}
        others = {row.name: dict(self._read(row)) for row in all_rows() if row.name not in asked}  # of earlier calls
        cells = {name: found for name, found in {**others, **self.cells}.items() if found or name in asked}
        document = frontier_table([row for row in all_rows() if row.name in cells], cells, self.settings)
        document |= {"command": provenance.command(), "date": provenance.date(), "git_commit": provenance.git_commit()}
        write_text(self.out / "frontier.json", json.dumps(document, indent=2, allow_nan=False) + "\n")
        write_text(self.out / "frontier.csv", to_csv(document))
        write_text(self.out / "report.html", to_html(document))
        return document
