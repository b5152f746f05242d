"""`thintune bench cost`."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from thintune.cli.parser import bench_cost_parser
from thintune.errors import ConfigError, nearest

_USAGE = "usage: thintune bench cost --out FOLDER [flags]; `thintune bench cost --help` lists the flags."
_WIDTH = 180
"""Columns of the printed table where there is no terminal."""
_WHOLE = ("row", "peak, MB", "s/image")
_OWN = ("config", "out", "list")


def run(words: Sequence[str]) -> int:
    """Runs a bench; returns the exit code."""
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if words else 2
    if words[0] != "cost":
        raise ConfigError(f"bench {words[0]}: unknown bench, expected cost.{nearest(words[0], ['cost'])}")
    parser = bench_cost_parser()
    parsed = parser.parse_args(list(words[1:])).as_dict()
    from thintune.bench.rows import select_rows
    from thintune.bench.settings import settings_from_dict

    settings = settings_from_dict({key: value for key, value in parsed.items() if key not in _OWN})
    if parsed["list"]:
        for row in select_rows(settings.rows, settings.batch_size):
            print(f"{row.name:32} exact gradients: {row.exact_gradients}")
        return 0
    if not parsed["out"]:
        raise ConfigError("--out: expected a folder, got none.")
    from thintune.bench.cost import run_cost

    display = CostBar()
    document = run_cost(settings, Path(parsed["out"]), display)
    return display.table(document, Path(parsed["out"]))


class CostBar:
    """A bar with the time left on a terminal; a line a process elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._bar: Progress | None = None
        self._done = self._cells = 0

    def say(self, text: str) -> None:
        """Prints lines."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, cells: int, done: int) -> None:
        """Opens the bar."""
        self._cells, self._done = cells, done
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]}"),
            )
            self._bar = Progress(*columns, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task("bench cost", total=cells, completed=done, left="")

    def begin(self, name: str) -> None:
        """Names the row that runs."""
        if self._bar is not None:
            self._bar.update(self._task, description=name)

    def end(self, cell: dict[str, Any], left_s: float | None) -> None:
        """Says how a process ended."""
        self._done += 1
        peak = cell.get("peak_above_baseline_bytes")
        words = [cell["row"]["name"], cell["status"]]
        words += [] if peak is None else [f"{peak / 1e6:.0f} MB above baseline"]
        words += [] if cell["error"] is None else [cell["error"]]
        left = "" if left_s is None else f"about {datetime.timedelta(seconds=round(left_s))} left"
        self.say(f"{self._done}/{self._cells} {', '.join(words)}{'; ' + left if left and self._bar is None else ''}")
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, left=left)

    def stop(self) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def table(self, document: dict[str, Any], out: Path) -> int:
        """Prints the table; returns the exit code: 2 where a row failed."""
        from thintune.bench.table import HEADINGS, NOTES, describe, table_cells

        table = Table(title=f"{describe(document['settings'])}; {out}/table.json", title_justify="left")
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading == "row" else "right", no_wrap=heading in _WHOLE)
        for texts in table_cells(document, reasons=False):
            table.add_row(*texts)
        console = Console()
        if not console.is_terminal:
            console = Console(width=_WIDTH)
        console.print(table)
        console.print(NOTES, highlight=False, markup=False)
        failed = [f"{row['row']['name']}: {error}" for row in document["rows"] for error in row["errors"]]
        if document["not_limited_because"]:
            self.say(f"not limited: {document['not_limited_because']}")
        for line in failed:
            self.say(f"thintune: error: {line}")
        return 2 if failed else 0
