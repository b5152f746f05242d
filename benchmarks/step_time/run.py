"""One optimizer step and one inference pass of the frontier's rows, alternating in one process.

DINOv2 ViT-S/14 at 56 pixels, batch 128, AdamW. Writes medians, quartiles and every single time to
benchmarks/results/step_time, one file for each number of threads.

    python benchmarks/step_time/run.py --backbone runs/dinov2_vits14.safetensors
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thintune.config import DataConfig, Method, ModelConfig, RunConfig, ThinConfig, TrainConfig
from thintune.measure import count_flops, interleave, median_and_iqr
from thintune.optim import ThinStep, build_optimizer
from thintune.train.prepare import build, load_data

RESULTS = Path(__file__).parent.parent / "results" / "step_time"
ACCURATE = ThinConfig(rank_allocation="sensitivity", output_weighting="gradient")
"""How the frontier's rows of `thin` are converted."""
ROWS: dict[str, tuple[Method, ThinConfig]] = {
    "dense": ("dense", ThinConfig()),
    "lora-r16": ("lora", ThinConfig()),
    "svd_lora-0.4": ("svd_lora", ThinConfig(kept=0.4)),
    "wasi-0.8": ("wasi", ThinConfig(explained_variance=0.8)),
    "thin-0.6": ("thin", dataclasses.replace(ACCURATE, kept=0.6)),
    "thin-0.4": ("thin", dataclasses.replace(ACCURATE, kept=0.4)),
    "thin-0.4-r96": ("thin", dataclasses.replace(ACCURATE, kept=0.4, activation_rank=96)),
    "thin-0.25": ("thin", dataclasses.replace(ACCURATE, kept=0.25)),
    "thin-0.25-r96": ("thin", dataclasses.replace(ACCURATE, kept=0.25, activation_rank=96)),
}


def training_step(model: nn.Module, config: RunConfig, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """A callable that does one optimizer step."""
    optimizer = build_optimizer(model, config.train)
    ThinStep(model, optimizer, refresh_every=config.thin.refresh_every)

    def step() -> None:
        model.train()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def inference(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """A callable that does one forward pass without gradients."""

    def run() -> None:
        model.eval()
        with torch.no_grad():
            model(images)

    return run


def main() -> None:
    """Times all rows and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, help="safetensors file of the DINOv2 script")
    parser.add_argument("--repeats", type=int, default=10, help="rounds; every row once a round")
    parser.add_argument("--threads", nargs="+", type=int, help="numbers of threads, one after another; default: all")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    data = DataConfig(name="fashion-mnist", image_size=56, train_limit=512)
    base = RunConfig(method="dense", model=ModelConfig(checkpoint=arguments.backbone), data=data, train=TrainConfig())
    splits = load_data(base.model, base.data)
    images, labels = splits.train.images(torch.arange(128)), splits.train.labels[:128]
    steps, passes, flops, kept = {}, {}, {}, {}
    for name, (method, thin) in ROWS.items():
        config = dataclasses.replace(base, method=method, thin=thin)
        model, report = build(config, splits)
        steps[name] = training_step(model, config, images, labels)
        passes[name] = inference(model, images)
        flops[name] = count_flops(steps[name])
        kept[name] = 1.0 if report is None else report.kept_weight_fraction
    for threads in arguments.threads or [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        times = {
            "step_s": interleave(steps, arguments.repeats, 1),
            "inference_s": interleave(passes, arguments.repeats, 1),
        }
        rows = {name: {"kept_weight_fraction": kept[name], "flops_per_step": flops[name]} for name in ROWS}
        for name, row in rows.items():
            for kind, found in times.items():
                row[f"{kind}_median"], row[f"{kind}_iqr"] = median_and_iqr(found[name])
                row[kind] = found[name]
        document = {
            "command": "python benchmarks/step_time/run.py " + " ".join(sys.argv[1:]),
            "date": datetime.date.today().isoformat(),
            "batch_size": 128,
            "image_size": 56,
            "seed": base.train.seed,
            "threads": threads,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
            "rows": rows,
        }
        (RESULTS / f"threads_{threads}.json").write_text(json.dumps(document, indent=2) + "\n")
        for name, row in rows.items():
            step, inference_time = row["step_s_median"], row["inference_s_median"]
            print(f"{threads} threads, {name}: step {step:.3f} s, inference {inference_time:.3f} s")


if __name__ == "__main__":
    main()
