"""The plots of the frontier's report, each as the text of an SVG image."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from thintune.errors import MissingDependencyError

Row = dict[str, Any]
AXES = {
    "peak_above_baseline_bytes": ("peak memory above the imported libraries, MB", 1e6),
    "step_time_s_median": ("time of an optimizer step, s", 1.0),
    "kept_weight_fraction": ("share of the linear layers' weights kept", 1.0),
    "train_flops_per_step": ("matrix products of an optimizer step, GFLOP", 1e9),
}
"""What accuracy is drawn against: label and unit."""
_FAMILIES = {
    "thin": ("#d1495b", "thin", "o"),
    "dense": ("#22223b", "dense and head", "s"),
    "head": ("#22223b", "dense and head", "s"),
}
_PUBLISHED = ("#2a9d8f", "asi, wsi, wasi, amc", "^")
_ADAPTERS = ("#6c757d", "adapters and galore", "D")


def pyplot() -> Any:
    """Matplotlib, drawing into SVG files.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import matplotlib as mpl

        mpl.use("svg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise MissingDependencyError("the report needs matplotlib; pip install 'thintune[bench]'.") from error
    mpl.rcParams.update(
        {"svg.hashsalt": "thintune", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    return plt


def _svg(plt: Any, figure: Any) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return re.sub(r"^.*?(?=<svg)", "", stream.getvalue(), flags=re.DOTALL)


def _family(method: str) -> tuple[str, str, str]:
    return _FAMILIES.get(method, _PUBLISHED if method in ("asi", "wsi", "wasi", "amc") else _ADAPTERS)


def frontiers(rows: Sequence[Row]) -> str:
    """Test accuracy against memory, time, kept weights and FLOPs; bars are a standard deviation over seeds."""
    plt = pyplot()
    figure, panels = plt.subplots(2, 2, figsize=(11, 8.5))
    points: list[Row] = []
    for axes, (field, (label, unit)) in zip(panels.flat, AXES.items(), strict=True):
        known: set[str] = set()
        points = [row for row in rows if row["test_accuracy"] and row[field] is not None]
        for row in points:
            colour, name, marker = _family(row["method"])
            accuracy, spread = 100 * row["test_accuracy"]["mean"], 100 * (row["test_accuracy"]["std"] or 0)
            axes.errorbar(
                row[field] / unit,
                accuracy,
                yerr=spread,
                color=colour,
                marker=marker,
                markersize=5,
                capsize=2,
                linestyle="none",
                label=None if name in known else name,
            )
            axes.annotate(row["name"], (row[field] / unit, accuracy), (4, 4), textcoords="offset points", fontsize=7)
            known.add(name)
        steps = _staircase([(row[field] / unit, 100 * row["test_accuracy"]["mean"]) for row in points])
        axes.plot([x for x, _ in steps], [y for _, y in steps], color="#adb5bd", linewidth=0.8, zorder=0)
        axes.set_xlabel(label)
        axes.set_ylabel("test accuracy, %")
    if points:
        panels[0, 0].legend(fontsize=8, loc="lower right")
    return _svg(plt, figure)


def _staircase(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of the line under which a point is beaten: no more cost, at least as accurate."""
    corners: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not corners:
            corners.append((x, y))
        elif y > corners[-1][1]:
            corners += [(x, corners[-1][1]), (x, y)]
    return corners


def sweeps(rows: Sequence[Row]) -> str:
    """Validation accuracy by learning rate, seed 0."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for number, row in enumerate(rows):
        found = [point for point in row["sweep"] if point["val_accuracy"] is not None]
        x, y = [point["learning_rate"] for point in found], [100 * point["val_accuracy"] for point in found]
        colour, _, marker = _family(row["method"])
        line = ("-", "--", "-.", ":")[number % 4]
        axes.plot(x, y, line, color=colour, marker=marker, markersize=4, linewidth=1)
        if found:
            axes.annotate(row["name"], (x[-1], y[-1]), (4, 0), textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation accuracy, %")
    return _svg(plt, figure)


def ranks(row: Row) -> str:
    """Rank of every layer's weight, and the ranks that explain 80 and 99 % of its variance, before and after."""
    plt = pyplot()
    document = row["subspaces"]
    layers = {name: found["weight"] for name, found in document["layers"].items() if "weight" in found}
    figure, axes = plt.subplots(figsize=(11, 2.6))
    places = range(len(layers))
    axes.bar(places, [found["rank"] for found in layers.values()], color="#e9c5ca", label="rank")
    for share, colour in ((0.8, "#d1495b"), (0.99, "#22223b")):
        column = document["explained_variances"].index(share)
        for moment, marker, when in ((0, "_", "start"), (-1, "x", "end")):
            values = [found["explained_ranks"][moment][column] for found in layers.values()]
            axes.scatter(places, values, 14, colour, marker, linewidths=1, label=f"explains {share:.0%}, {when}")
    axes.set_xticks(list(places), [_short(name) for name in layers], rotation=90, fontsize=5)
    axes.set_ylabel("rank")
    axes.legend(fontsize=6, ncols=5, loc="upper left", bbox_to_anchor=(0, 1.22))
    return _svg(plt, figure)


def angles(row: Row) -> str:
    """Mean principal angle of every layer's bases to where they started, and to the epoch before."""
    plt = pyplot()
    document = row["subspaces"]
    layers = document["layers"]
    panels: list[tuple[str, str, Callable[[dict[str, Any]], list[float]]]] = [
        (basis, since, lambda found, since=since: found[f"mean_angle_{since}_deg"])
        for basis in ("weight", "input")
        for since in ("from_start", "from_last")
        if any(basis in found for found in layers.values())
    ]
    figure, grid = plt.subplots(1, len(panels), figsize=(2.9 * len(panels), 6), squeeze=False)
    for axes, (basis, since, values) in zip(grid[0], panels, strict=True):
        names = [name for name, found in layers.items() if basis in found]
        image = axes.imshow([values(layers[name][basis]) for name in names], aspect="auto", cmap="magma", vmin=0)
        axes.set_title(f"{basis}, degrees {since.replace('_', ' ')}", fontsize=8)
        axes.set_xticks(range(len(document["epochs"])), document["epochs"], fontsize=6)
        axes.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=5)
        axes.set_xlabel("epoch")
        figure.colorbar(image, ax=axes, fraction=0.05)
    figure.tight_layout()
    return _svg(plt, figure)


def _short(name: str) -> str:
    return name.removeprefix("blocks.").replace("attn.", "").replace("mlp.", "")
