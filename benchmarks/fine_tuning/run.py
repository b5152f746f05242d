"""DINOv2 ViT-S/14 on Fashion-MNIST (56 px, 4,096 images, 3 epochs): learning-rate sweeps, then three seeds.

Every cell is one `thintune train` in a process of its own; its record is kept under benchmarks/results/fine_tuning.
A cell that has a record is not run again. Methods alternate, so that a slow minute of the machine hits all of them.

    python benchmarks/backbones/dinov2_vits14.py --out runs/dinov2_vits14.safetensors
    python benchmarks/fine_tuning/run.py --backbone runs/dinov2_vits14.safetensors
    python benchmarks/fine_tuning/table.py
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "results" / "fine_tuning"
METHODS = {
    "dense": ["--method", "dense"],
    "thin-0.6": ["--method", "thin", "--thin.kept", "0.6"],
    "wasi-0.8": ["--method", "wasi", "--thin.explained_variance", "0.8"],
    "wasi-0.9": ["--method", "wasi", "--thin.explained_variance", "0.9"],
}
LEARNING_RATES = ("1e-5", "3e-5", "1e-4")
SEEDS = (0, 1, 2)


def cell(method: str, rate: str, seed: int) -> Path:
    """File of one cell's record."""
    return RESULTS / f"{method}_lr{rate}_seed{seed}.json"


def run_cell(backbone: Path, method: str, rate: str, seed: int) -> None:
    """Runs one cell unless it has a record."""
    target = cell(method, rate, seed)
    if target.exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = ["--model.name", "timm:vit_small_patch14_dinov2", "--model.checkpoint", str(backbone)]
        words += ["--data.name", "fashion-mnist", "--data.image_size", "56", "--data.train_limit", "4096"]
        words += ["--train.epochs", "3", "--train.batch_size", "128", "--train.learning_rate", rate]
        words += ["--train.seed", str(seed), *METHODS[method], "--out", str(out)]
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # waiting threads sleep: the machine may be shared
        subprocess.run([sys.executable, "-m", "thintune", "train", *words], check=True, env=environment)
        RESULTS.mkdir(parents=True, exist_ok=True)
        shutil.copy(out / "record.json", target)


def best_rate(method: str) -> str:
    """The rate of the sweep with the best validation accuracy; the test accuracy is not looked at."""
    rates = [r for r in LEARNING_RATES if cell(method, r, 0).exists()]
    return max(rates, key=lambda r: json.loads(cell(method, r, 0).read_text())["val_accuracy"])


def main() -> None:
    """Sweeps on seed 0, then the other seeds at each method's best rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, required=True, help="safetensors file of the DINOv2 script")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    for rate in LEARNING_RATES:
        for method in arguments.methods:
            run_cell(arguments.backbone, method, rate, 0)
    for seed in SEEDS[1:]:
        for method in arguments.methods:
            run_cell(arguments.backbone, method, best_rate(method), seed)


if __name__ == "__main__":
    main()
