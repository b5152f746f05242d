"""`thintune bench cost`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from thintune.cli.bench_bar import BenchBar
from thintune.cli.parser import bench_cost_parser
from thintune.errors import ConfigError

_WIDTH = 180
"""Columns of the printed table where there is no terminal."""
_WHOLE = ("row", "peak, MB", "s/image")
_OWN = ("config", "out", "list")


def run(words: Sequence[str]) -> int:
    """Runs the bench; returns the exit code."""
    parser = bench_cost_parser()
    parsed = parser.parse_args(list(words)).as_dict()
    from thintune.bench.cost.rows import select_rows
    from thintune.bench.cost.settings import settings_from_dict

    settings = settings_from_dict({key: value for key, value in parsed.items() if key not in _OWN})
    if parsed["list"]:
        for row in select_rows(settings.rows, settings.batch_size):
            print(f"{row.name:32} exact gradients: {row.exact_gradients}")
        return 0
    if not parsed["out"]:
        raise ConfigError("--out: expected a folder, got none.")
    from thintune.bench.cost.bench import run_cost

    display = CostBar()
    document = run_cost(settings, Path(parsed["out"]), display)
    return display.table(document, Path(parsed["out"]))


class CostBar(BenchBar):
    """Progress and table of the bench."""

    def __init__(self) -> None:
        super().__init__("bench cost")

    def end(self, cell: dict[str, Any], left_s: float | None) -> None:
        """Says how a process ended."""
        peak = cell.get("peak_above_baseline_bytes")
        words = [cell["row"]["name"], cell["status"]]
        words += [] if peak is None else [f"{peak / 1e6:.0f} MB above baseline"]
        words += [] if cell["error"] is None else [cell["error"]]
        self.ended(", ".join(words), left_s)

    def table(self, document: dict[str, Any], out: Path) -> int:
        """Prints the table; returns the exit code: 2 where a row failed."""
        from thintune.bench.cost.table import HEADINGS, NOTES, describe, table_cells

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
