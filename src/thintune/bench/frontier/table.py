"""From cells to one table: every row at its best rate, and which row is better than which."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from thintune.bench.frontier.rows import FrontierRow
from thintune.bench.frontier.settings import FrontierSettings, frontier_to_dict
from thintune.bench.frontier.sweep import Cells, sweep

SCHEMA_VERSION = 1
COSTS = {"memory": "peak_above_baseline_bytes", "time": "step_time_s_median"}
"""What accuracy is weighed against, and the field that measures it."""
_MEDIANS = (
    "peak_above_baseline_bytes",
    "train_peak_above_baseline_bytes",
    "step_time_s_median",
    "train_flops_per_step",
    "saved_activation_bytes",
    "kept_weight_fraction",
    "parameter_bytes",
    "checkpoint_bytes",
    "prepare_time_s",
)
_PER_CELL = ("steps", "threads", "date", "git_commit")
_TEST = {"test_accuracy": "accuracy", "inference_images_per_s": "images_per_s"}


def frontier_table(
    rows: Sequence[FrontierRow], cells: Mapping[str, Cells], settings: FrontierSettings
) -> dict[str, Any]:
    """One entry a row, with mean and standard deviation of accuracy over its seeds, and who beats whom.

    Args:
        rows: in the order of the table.
        cells: by row.
        settings: of the bench.
    """
    found = [_summary(row, cells.get(row.name, {}), settings) for row in rows]
    for row in found:
        row["beaten_by"] = {cost: _beaten_by(row, found, field) for cost, field in COSTS.items()}
    runs = [_run(cell) for row in rows for _, cell in sorted(cells.get(row.name, {}).items())]
    versions = next((cell["record"]["versions"] for c in cells.values() for cell in c.values() if cell["record"]), {})
    return {
        "schema_version": SCHEMA_VERSION,
        "settings": frontier_to_dict(settings),
        "versions": versions,
        "rows": found,
        "runs": runs,
    }


def _summary(row: FrontierRow, cells: Cells, settings: FrontierSettings) -> dict[str, Any]:
    state = sweep(row, cells, settings)
    chosen = {seed: cells[rate, seed] for rate, seed in sorted(cells) if rate == state.best and seed < settings.seeds}
    done = {seed: cell for seed, cell in chosen.items() if cell["status"] == "completed"}
    records = [cell["record"] for cell in done.values()]
    tests = [cell["test"] for cell in done.values() if cell["test"] is not None]
    tried = [(rate, cells[rate, 0]) for rate in state.tried if (rate, 0) in cells]
    return {
        "name": row.name,
        "method": row.method,
        "ours": row.ours,
        "learning_rate": state.best,
        "sweep": [{"learning_rate": rate, **_state(cell)} for rate, cell in tried],
        "seeds": sorted(done),
        "tested": len(tests),
        "ended": {seed: cell["status"] for seed, cell in chosen.items()},
        "val_accuracy": _spread(record["val_accuracy"] for record in records),
        "test_accuracy": _spread(test["accuracy"] for test in tests),
        "inference_images_per_s": _median(test["images_per_s"] for test in tests),
        **{name: _median(record[name] for record in records) for name in _MEDIANS},
        "subspaces": next((c["subspaces"] for c in reversed(list(done.values())) if c["subspaces"]), None),
    }


def _state(cell: Mapping[str, Any]) -> dict[str, Any]:
    completed = cell["status"] == "completed"
    return {"status": cell["status"], "val_accuracy": cell["record"]["val_accuracy"] if completed else None}


def _run(cell: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the CSV."""
    record, test = cell["record"] or {}, cell["test"] or {}
    return {
        "row": cell["row"]["name"],
        "method": cell["row"]["method"],
        "learning_rate": cell["learning_rate"],
        "seed": cell["seed"],
        "status": cell["status"],
        "val_accuracy": record.get("val_accuracy"),
        **{name: test.get(field) for name, field in _TEST.items()},
        **{name: record.get(name) for name in (*_MEDIANS, *_PER_CELL)},
        "error": cell["error"],
    }


def _spread(values: Iterable[float]) -> dict[str, Any] | None:
    found = list(values)
    if not found:
        return None
    std = statistics.stdev(found) if len(found) > 1 else None
    return {"mean": statistics.fmean(found), "std": std, "values": found}


def _median(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None


def _beaten_by(row: dict[str, Any], rows: Sequence[dict[str, Any]], cost: str) -> list[dict[str, Any]]:
    """The rows that are at least as accurate at no higher cost, and better in one of the two.

    `clear` says that the accuracies are further apart than one standard deviation of their difference.
    """
    mine = row["test_accuracy"]
    if mine is None or row[cost] is None:
        return []
    better = []
    for other in rows:
        theirs = other["test_accuracy"]
        if other is row or theirs is None or other[cost] is None:
            continue
        gain, saving = theirs["mean"] - mine["mean"], row[cost] - other[cost]
        if gain >= 0 and saving >= 0 and (gain > 0 or saving > 0):
            noise = ((mine["std"] or 0.0) ** 2 + (theirs["std"] or 0.0) ** 2) ** 0.5
            better.append({"name": other["name"], "accuracy_gain": gain, "clear": gain > noise})
    return better


def to_csv(document: Mapping[str, Any]) -> str:
    """One line a run."""
    if not document["runs"]:
        return ""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(document["runs"][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(document["runs"])
    return stream.getvalue()
