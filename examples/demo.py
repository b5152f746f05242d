"""The main job on an embedded default: a small ViT learns handwritten digits, dense, as published, and thin.

Each row of the table is a process of its own and leaves a record. Runs offline, in a few minutes on two cores.

    python examples/demo.py --out runs/demo
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

MODEL = Path(__file__).parent.parent / "models" / "vit_demo" / "model.safetensors"
SETTINGS = [
    *("--model.name", "timm:vit_tiny_patch16_224"),
    *("--model.options", '{"patch_size": 4, "depth": 4}'),
    *("--model.checkpoint", str(MODEL)),
    *("--data.name", "digits"),
    *("--data.image_size", "28"),
    *("--train.epochs", "5"),
    *("--train.batch_size", "64"),
    *("--train.learning_rate", "3e-4"),
]
ROWS = {
    "dense": ["--method", "dense"],
    "wasi": ["--method", "wasi", "--thin.explained_variance", "0.8"],
    "thin": ["--method", "thin", "--thin.kept", "0.4"],
}
WHAT = {"dense": "every weight", "wasi": "as published, explained variance 0.8", "thin": "ours, 0.4 of the weights"}


def main() -> int:
    """Runs the three rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the three runs")
    parser.add_argument("--seed", default="0", help="seed of the three runs")
    arguments = parser.parse_args()
    console = Console()
    records = {}
    for name, flags in ROWS.items():
        console.rule(f"{name}: {WHAT[name]}")
        out = arguments.out / name
        words = [*SETTINGS, *flags, "--train.seed", arguments.seed, "--out", str(out), "--overwrite"]
        code = subprocess.run([sys.executable, "-m", "thintune", "train", *words], check=False).returncode
        if code:
            return code
        records[name] = json.loads((out / "record.json").read_text())
    console.print(table(records))
    console.print(
        f"Records: {arguments.out}/*/record.json. The runtime itself (Python, torch, timm) takes "
        f"{records['dense']['baseline_rss_bytes'] / 1e6:.0f} MB more in every row."
    )
    return 0


def table(records: dict[str, dict]) -> Table:
    """One row a method."""
    result = Table(title="Small ViT, Fashion-MNIST -> digits", title_justify="left")
    for heading in ("method", "test accuracy", "peak above runtime", "step", "checkpoint", "inference"):
        result.add_column(heading, justify="left" if heading == "method" else "right")
    for name, record in records.items():
        result.add_row(
            f"{name} ({WHAT[name]})",
            f"{100 * record['test_accuracy']:.1f} %",
            f"{record['peak_above_baseline_bytes'] / 1e6:.0f} MB",
            f"{1000 * record['step_time_s_median']:.0f} ms",
            f"{record['checkpoint_bytes'] / 1e6:.2f} MB",
            f"{record['inference_images_per_s']:.0f} images/s",
        )
    return result


if __name__ == "__main__":
    sys.exit(main())
