"""Prints the tables of the README from the records under benchmarks/results/fine_tuning.

python benchmarks/fine_tuning/table.py
"""

from __future__ import annotations

import json
import statistics
from typing import Any

from run import LEARNING_RATES, METHODS, SEEDS, best_rate, cell


def records(method: str) -> list[dict[str, Any]]:
    """Records of every seed at the method's best rate."""
    rate = best_rate(method)
    return [json.loads(cell(method, rate, s).read_text()) for s in SEEDS if cell(method, rate, s).exists()]


def spread(values: list[float], pattern: str) -> str:
    """Mean and standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{pattern.format(statistics.mean(values))} ± {pattern.format(deviation)}"


def main() -> None:
    """Prints the learning-rate sweep and the table over seeds, as Markdown."""
    present = [m for m in METHODS if cell(m, LEARNING_RATES[0], 0).exists()]
    print("| method | " + " | ".join(f"lr {rate}" for rate in LEARNING_RATES) + " |")
    print("|---|" + "---|" * len(LEARNING_RATES))
    for method in present:
        found = [cell(method, rate, 0) for rate in LEARNING_RATES]
        shown = [f"{100 * json.loads(f.read_text())['val_accuracy']:.1f}" if f.exists() else "-" for f in found]
        print(f"| {method} | " + " | ".join(shown) + " |")
    headings = "method", "kept", "lr", "seeds", "test accuracy, %", "step, s", "peak, MB", "checkpoint, MB"
    print(f"\n| {' | '.join(headings)} |")
    print("|---" * len(headings) + "|")
    for method in present:
        rows = records(method)
        print(
            f"| {method} | {rows[0]['kept_weight_fraction']:.2f} | {best_rate(method)} | {len(rows)} "
            f"| {spread([100 * r['test_accuracy'] for r in rows], '{:.2f}')} "
            f"| {spread([r['step_time_s_median'] for r in rows], '{:.2f}')} "
            f"| {max(r['peak_above_baseline_bytes'] for r in rows) / 1e6:.0f} "
            f"| {rows[0]['checkpoint_bytes'] / 1e6:.1f} |"
        )


if __name__ == "__main__":
    main()
