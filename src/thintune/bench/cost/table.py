"""From cells to one table: medians, spread, and what the papers count beside what the process took."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

HEADINGS = (
    "row",
    "ended",
    "peak, MB",
    "predicted",
    "s/image",
    "inference at 1 / 16",
    "checkpoint, MB",
    "exact",
    "memory",
    "speed",
    "paper, MB",
    "paper memory",
    "paper FLOPs",
)
NOTES = """\
Peak of resident memory above that of the imported libraries, loading included, and what the closed formulas of
thintune.costs predict; inference in images/s at batch 1 and 16;
exact: whether gradients are those of the batch; memory and speed: times less and times faster than the plain dense row
of the same micro-batch. Medians over processes, lowest to highest in brackets; * least memory, + fastest of its method.
Paper: weights and kept inputs of the converted linear layers alone (arXiv 2510.09160), for one micro-batch; times less
memory and times fewer FLOPs than dense layers counted alike."""
_MEASURED = ("peak_above_baseline_bytes", "load_peak_above_baseline_bytes", "train_peak_above_baseline_bytes")


def cost_table(
    cells: Sequence[dict[str, Any]], settings: dict[str, Any], not_limited: str | None = None
) -> dict[str, Any]:
    """One entry a row, in the order of the cells.

    Args:
        cells: of the bench.
        settings: of the bench.
        not_limited: why an asked limit was not set.
    """
    by_row: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        by_row.setdefault(cell["row"]["name"], []).append(cell)
    rows = [_summary(found) for found in by_row.values()]
    dense = {
        row["row"]["micro_batch"]: row
        for row in rows
        if row["row"]["name"] in ("dense-full", f"dense-mb{row['row']['micro_batch']}")
    }
    for row in rows:
        plain = dense.get(row["row"]["micro_batch"], {})
        for name, value in (("memory_ratio_to_dense", "peak_above_baseline_bytes"), ("speed_to_dense", "s_per_image")):
            row[name] = _ratio(plain.get(value), row[value])
    _mark_best(rows)
    return {"schema_version": 1, "settings": settings, "not_limited_because": not_limited, "rows": rows}


def _summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    done = [cell for cell in cells if cell["status"] == "finished"]
    endings = [cell["status"] for cell in cells]
    last = cells[-1]
    summary: dict[str, Any] = {
        "row": last["row"],
        "endings": {ending: endings.count(ending) for ending in dict.fromkeys(endings)},
        "errors": sorted({cell["error"] for cell in cells if cell["error"]}),
        "limit": last["limit"],
        "predicted_peak_bytes": last["predicted_peak_bytes"],
    }
    for name in (*_MEASURED, "baseline_rss_bytes", "checkpoint_bytes", "checkpoint_base_bytes"):
        summary |= _spread(name, (cell.get(name) for cell in done))
    summary |= _spread("s_per_image", (s for cell in done for s in cell.get("s_per_image", ())))
    for size in ("1", "16"):
        speeds = (cell.get("inference_images_per_s", {}).get(size) for cell in done)
        summary |= _spread(f"inference_images_per_s_{size}", speeds)
    summary["paper"] = next((cell["paper"] for cell in done if cell.get("paper")), None)
    return summary


def _spread(name: str, values: Iterable[float | None]) -> dict[str, Any]:
    """Median, lowest and highest of what was measured."""
    known = [value for value in values if value is not None]
    middle = statistics.median(known) if known else None
    return {name: middle, f"{name}_range": [min(known), max(known)] if known else None}


def _ratio(upper: float | None, lower: float | None) -> float | None:
    return None if upper is None or not lower else upper / lower


def _mark_best(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["best_of_method"] = []
    for mark, value in (("memory", "peak_above_baseline_bytes"), ("time", "s_per_image")):
        best: dict[str, dict[str, Any]] = {}
        for row in rows:
            method = f"{row['row']['method']} {row['row']['kept']}"
            if row[value] is not None and (method not in best or row[value] < best[method][value]):
                best[method] = row
        for row in best.values():
            row["best_of_method"].append(mark)


def table_cells(document: dict[str, Any], *, reasons: bool = True) -> list[list[str]]:
    """The table's text, one list a row, under `HEADINGS`; with the reasons why gradients are not exact."""
    return [_texts(row, reasons) for row in document["rows"]]


def _texts(row: dict[str, Any], reasons: bool) -> list[str]:
    best, paper = row["best_of_method"], row["paper"] or {}
    speeds = [_number(row[f"inference_images_per_s_{size}"], "{:.1f}") for size in (1, 16)]
    return [
        row["row"]["name"],
        _endings(row),
        _with_range(row, "peak_above_baseline_bytes", "{:.0f}", 1e6) + (" *" if "memory" in best else ""),
        _predicted(row),
        _with_range(row, "s_per_image", "{:.3f}") + (" +" if "time" in best else ""),
        "-" if speeds == ["-", "-"] else " / ".join(speeds),
        _checkpoint(row),
        row["row"]["exact_gradients"] if reasons else re.split("[:,]", row["row"]["exact_gradients"])[0],
        _number(row["memory_ratio_to_dense"], "{:.2f}x"),
        _number(row["speed_to_dense"], "{:.2f}x"),
        _number(paper.get("memory_bytes"), "{:.0f}", 1e6),
        _number(paper.get("memory_ratio_to_dense"), "{:.2f}x"),
        _number(paper.get("flops_ratio_to_dense"), "{:.2f}x"),
    ]


def _predicted(row: dict[str, Any]) -> str:
    """The formula's peak and how far it is off."""
    predicted, measured = row["predicted_peak_bytes"], row["peak_above_baseline_bytes"]
    if predicted is None:
        return "-"
    return f"{predicted / 1e6:.0f}" + (f" ({predicted / measured - 1:+.0%})" if measured else "")


def _endings(row: dict[str, Any]) -> str:
    found = row["endings"]
    text = ", ".join(ending if len(found) == 1 and n == 1 else f"{ending} {n}x" for ending, n in found.items())
    limit = row["limit"]
    return text if limit is None or limit["limited"] else f"{text} (not limited)"


def _checkpoint(row: dict[str, Any]) -> str:
    text, base = _number(row["checkpoint_bytes"], "{:.1f}", 1e6), row["checkpoint_base_bytes"]
    return f"{text} and {base / 1e6:.0f} of the base" if base else text


def _with_range(row: dict[str, Any], name: str, pattern: str, unit: float = 1.0) -> str:
    value, spread = row[name], row[f"{name}_range"]
    if value is None:
        return "-"
    if spread[0] == spread[1]:
        return pattern.format(value / unit)
    low, high = (pattern.format(end / unit) for end in spread)
    return f"{pattern.format(value / unit)} ({low}-{high})"


def _number(value: float | None, pattern: str, unit: float = 1.0) -> str:
    return "-" if value is None else pattern.format(value / unit)


def describe(settings: dict[str, Any]) -> str:
    """One line on what was measured."""
    threads = "all" if settings["threads"] is None else settings["threads"]
    text = (
        f"{settings['model']['name']}, {settings['image_size']} px, effective batch {settings['batch_size']}, SGD with "
        f"momentum, {settings['steps']} timed steps, up to {settings['repeats']} processes a row, {threads} threads"
    )
    return text if settings["limit"] is None else f"{text}, limit {settings['limit']}"


def to_markdown(document: dict[str, Any]) -> str:
    """The table as a Markdown page."""
    lines = [f"# thintune bench cost\n\n{describe(document['settings'])}.\n"]
    if document["not_limited_because"]:
        lines.append(f"The limit is not permitted here, no row was limited: {document['not_limited_because']}\n")
    lines += [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    lines += [f"| {' | '.join(texts)} |" for texts in table_cells(document)]
    failed = [f"- {row['row']['name']}: {error}" for row in document["rows"] for error in row["errors"]]
    lines += ["", NOTES, *(["", "Failed:", "", *failed] if failed else [])]
    return "\n".join(lines) + "\n"
