"""Pre-train the demo's small ViT on Fashion-MNIST, from random weights.

Writes `model.safetensors` (timm names) and `record.json` beside this file. Reads the IDX files of the Debian package
`dataset-fashion-mnist`; `--root` names another place. About twenty-five minutes on two cores.

    python models/vit_demo/pretrain.py --epochs 6
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import math
import platform
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

ARCHITECTURE = "vit_tiny_patch16_224"
OPTIONS = {"img_size": 28, "patch_size": 4, "depth": 4}
MEAN, STD = 0.5, 0.5


def read_idx(path: Path) -> torch.Tensor:
    """Reads one gzip-compressed IDX file of unsigned bytes."""
    with gzip.open(path, "rb") as stream:
        raw = stream.read()
    dimensions = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy())


def prepare(images: torch.Tensor) -> torch.Tensor:
    """Turns (B, 28, 28) bytes into (B, 3, 28, 28) floats in [-1, 1]."""
    scaled = (images.float() / 255 - MEAN) / STD
    return scaled[:, None].expand(-1, 3, -1, -1)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirrors half of the images and shifts the whole batch by up to two pixels."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip[:, None, None], images.flip(-1), images)
    dy, dx = torch.randint(0, 5, (2,), generator=generator).tolist()
    return F.pad(images, (2, 2, 2, 2))[:, dy : dy + 28, dx : dx + 28]


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images whose largest logit is the label's."""
    model.eval()
    hits = sum(
        int((model(prepare(images[i : i + 500])).argmax(1) == labels[i : i + 500]).sum())
        for i in range(0, len(images), 500)
    )
    model.train()
    return hits / len(images)


def main() -> None:
    """Runs the training and writes the two files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    images = read_idx(arguments.root / "train-images-idx3-ubyte.gz")
    labels = read_idx(arguments.root / "train-labels-idx1-ubyte.gz").long()
    model = timm.create_model(ARCHITECTURE, num_classes=10, **OPTIONS)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": arguments.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=arguments.learning_rate,
    )
    steps_per_epoch = len(images) // arguments.batch_size
    steps = steps_per_epoch * arguments.epochs
    warmup = steps_per_epoch // 2
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: min((t + 1) / warmup, 0.5 * (1 + math.cos(math.pi * t / steps))),
    )
    started = time.perf_counter()
    for epoch in range(arguments.epochs):
        order = torch.randperm(len(images), generator=generator)
        for i in range(steps_per_epoch):
            chosen = order[i * arguments.batch_size : (i + 1) * arguments.batch_size]
            batch = prepare(augment(images[chosen], generator))
            loss = F.cross_entropy(model(batch), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if i % 50 == 0:
                print(
                    f"epoch {epoch} step {i} loss {loss.item():.3f} {time.perf_counter() - started:.0f} s", flush=True
                )
    test_accuracy = accuracy(
        model,
        read_idx(arguments.root / "t10k-images-idx3-ubyte.gz"),
        read_idx(arguments.root / "t10k-labels-idx1-ubyte.gz").long(),
    )
    save_file(model.state_dict(), arguments.out / "model.safetensors")
    record = {
        "architecture": ARCHITECTURE,
        "options": OPTIONS,
        "dataset": "fashion-mnist",
        "test_accuracy": test_accuracy,
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": arguments.epochs,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "weight_decay": arguments.weight_decay,
        "seed": arguments.seed,
        "duration_s": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        "command": "python " + " ".join(["models/vit_demo/pretrain.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }
    (arguments.out / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
