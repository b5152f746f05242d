"""`thintune bench frontier`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from thintune.cli.bench_bar import BenchBar
from thintune.cli.parser import bench_frontier_parser
from thintune.errors import ConfigError

_WIDTH = 160
"""Columns of the printed table where there is no terminal."""
_OWN = ("config", "out", "list")


def run(words: Sequence[str]) -> int:
    """Runs the bench; returns the exit code."""
    parsed = bench_frontier_parser().parse_args(list(words)).as_dict()
    from thintune.bench.frontier.rows import first_rates, select_rows
    from thintune.bench.frontier.settings import frontier_from_dict

    settings = frontier_from_dict({key: value for key, value in parsed.items() if key not in _OWN})
    if parsed["list"]:
        for row in select_rows(settings.rows):
            print(f"{row.name:24} learning rates: {', '.join(f'{rate:g}' for rate in first_rates(row, settings))}")
        return 0
    if not parsed["out"]:
        raise ConfigError("--out: expected a folder, got none.")
    from thintune.bench.frontier.bench import run_frontier

    display = FrontierBar()
    document = run_frontier(settings, Path(parsed["out"]), display)
    return display.table(document, Path(parsed["out"]))


class FrontierBar(BenchBar):
    """Progress and table of the bench."""

    def __init__(self) -> None:
        super().__init__("bench frontier")

    def end(self, text: str, total: int, left_s: float | None) -> None:
        """Says how a process ended."""
        self.ended(text, left_s, total)

    def table(self, document: dict[str, Any], out: Path) -> int:
        """Prints the table; returns the exit code: 2 where a run failed."""
        from thintune.bench.frontier.report import HEADINGS, table_cells, verdicts

        table = Table(title=f"{out}/report.html", title_justify="left")
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading == "row" else "right", no_wrap=heading == "row")
        for row in document["rows"]:
            table.add_row(*table_cells(row))
        console = Console()
        if not console.is_terminal:
            console = Console(width=_WIDTH)
        console.print(table)
        for line in verdicts(document["rows"]):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        failed = [f"{run['row']}: {run['error']}" for run in document["runs"] if run["status"] == "failed"]
        for line in failed:
            self.say(f"thintune: error: {line}")
        return 2 if failed else 0
