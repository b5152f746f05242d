"""The frontier as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from thintune.bench.frontier.plots import angles, frontiers, ranks, sweeps
from thintune.bench.frontier.table import COSTS

Row = dict[str, Any]
HEADINGS = (
    "row",
    "rate",
    "test accuracy, %",
    "seeds",
    "peak, MB",
    "step, s",
    "kept",
    "GFLOP a step",
    "saved, MB",
    "checkpoint, MB",
    "inference, images/s",
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22223b; max-width: 1150px; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .7rem; text-align: right }
th { border-bottom: 1px solid #22223b; font-weight: 600 } td { border-bottom: 1px solid #dee2e6 }
td:first-child, th:first-child, td.words { text-align: left } tr.ours td { background: #fbeff1 }
code { background: #f1f3f5; padding: .1rem .3rem } figure { margin: 1rem 0 } figcaption { color: #6c757d }
svg { max-width: 100%; height: auto }
"""


def table_cells(row: Row) -> list[str]:
    """A row of the table, as text; a dash stands for what was not measured."""
    accuracy = row["test_accuracy"]
    shown = "-"
    if accuracy is not None:
        spread = "" if accuracy["std"] is None else f" ± {100 * accuracy['std']:.2f}"
        shown = f"{100 * accuracy['mean']:.2f}{spread}"
    return [
        row["name"],
        _number(row["learning_rate"], "{:g}"),
        shown,
        str(row["tested"]),
        _number(row["peak_above_baseline_bytes"], "{:.0f}", 1e6),
        _number(row["step_time_s_median"], "{:.3f}"),
        _number(row["kept_weight_fraction"], "{:.2f}"),
        _number(row["train_flops_per_step"], "{:.0f}", 1e9),
        _number(row["saved_activation_bytes"], "{:.0f}", 1e6),
        _number(row["checkpoint_bytes"], "{:.1f}", 1e6),
        _number(row["inference_images_per_s"], "{:.0f}"),
    ]


def _number(value: float | None, pattern: str, unit: float = 1.0) -> str:
    return "-" if value is None else pattern.format(value / unit)


def to_markdown(document: dict[str, Any]) -> str:
    """The table alone, for a page of documentation."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" + "|---:" * (len(HEADINGS) - 1) + "|"]
    lines += ["| " + " | ".join(table_cells(row)) + " |" for row in document["rows"]]
    return "\n".join(lines) + "\n"


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A sentence for each point of thintune's own method: which peers beat it, by memory and by time."""
    peers = {row["name"] for row in rows if not row["ours"]}
    lines = []
    for row in rows:
        if not row["ours"] or row["test_accuracy"] is None:
            continue
        words = []
        for cost in COSTS:
            better = [found for found in row["beaten_by"][cost] if found["name"] in peers]
            named = ", ".join(f"{found['name']} (+{100 * found['accuracy_gain']:.2f} points)" for found in better)
            words.append(f"at no more {cost}, {'no peer is as accurate' if not better else 'better: ' + named}")
        lines.append(f"{row['name']}: {'; '.join(words)}.")
    return lines


def to_html(document: dict[str, Any]) -> str:
    """The page.

    Args:
        document: of `frontier.json`.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    rows, settings = document["rows"], document["settings"]
    tested = [row for row in rows if row["test_accuracy"] is not None]
    data, model = settings["data"], settings["model"]
    images = "all" if data["train_limit"] is None else f"{data['train_limit']:,}"
    task = f"{model['name']} on {data['name']}, {data['image_size']} px, {images} training images"
    parts = [
        f"<h1>{escape(task)}</h1>",
        f"<p>Preset {escape(settings['preset'])}. Each row at the learning rate of its best validation accuracy (seed "
        "0); the test split was read once by each run shown. Accuracy: mean and standard deviation over seeds; all "
        "else: medians. Peak: of the process above the imported libraries, loading and calibration included.</p>",
        _table(HEADINGS, [(table_cells(row), row["ours"]) for row in rows]),
    ]
    if tested:
        parts.append(_figure(frontiers(rows), "Bars: a standard deviation over seeds. Grey: the frontier of all rows."))
        parts.append("<h2>What beats what</h2>")
        parts += [f"<p>{escape(line)}</p>" for line in verdicts(rows)]
        parts.append(
            "<p>Rows that are at least as accurate (mean over seeds) at no higher cost; in italics where the "
            "accuracies are no further apart than a standard deviation of their difference.</p>"
        )
        parts.append(_beaten(tested))
    parts.append("<h2>Learning rates</h2>")
    parts.append(_figure(sweeps(rows), "Validation accuracy, seed 0. A rate without a point diverged."))
    followed = [row for row in rows if row["subspaces"]]
    if followed:
        parts.append("<h2>How the subspaces move</h2>")
    for row in followed:
        parts.append(f"<h3>{escape(row['name'])}</h3>")
        if any("weight" in found for found in row["subspaces"]["layers"].values()):
            parts.append(_figure(ranks(row), "Every layer's rank, and the ranks that explain a share of its variance."))
        parts.append(_figure(angles(row), "Mean principal angles between a basis and where it was; one row a layer."))
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    parts.append(f"<h2>Made by</h2><p><code>{escape(document['command'])}</code></p>")
    parts.append(f"<p>{escape(document['date'])}; commit {escape(str(document['git_commit']))}; {escape(versions)}</p>")
    body = "\n".join(parts)
    head = f"<meta charset='utf-8'><title>thintune: frontier</title><style>{_STYLE}</style>"
    return f"<!doctype html>\n<html lang='en'><head>{head}</head><body>\n{body}\n</body></html>\n"


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(headings: Sequence[str], rows: Sequence[tuple[Sequence[str], bool]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in headings)
    lines = []
    for cells, ours in rows:
        kind = " class='ours'" if ours else ""
        lines.append(f"<tr{kind}>{''.join(f'<td>{escape(text)}</td>' for text in cells)}</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _beaten(rows: Sequence[Row]) -> str:
    head = "<th>row</th>" + "".join(f"<th>beaten at no more {cost} by</th>" for cost in COSTS)
    lines = []
    for row in rows:
        cells = [f"<td>{escape(row['name'])}</td>"]
        for cost in COSTS:
            better = row["beaten_by"][cost]
            named = ", ".join(
                escape(found["name"]) if found["clear"] else f"<i>{escape(found['name'])}</i>" for found in better
            )
            cells.append(f"<td class='words'>{named or 'none'}</td>")
        lines.append(f"<tr{' class=ours' if row['ours'] else ''}>{''.join(cells)}</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"
