"""Accuracy and speed of a model on a split."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from thintune.data import Split


@dataclass(frozen=True)
class Evaluation:
    """Result of one pass over a split."""

    accuracy: float | None
    """Share of images whose largest logit is the label's; None for an empty split."""
    images_per_s: float | None
    """Median over batches of the forward pass alone; None for an empty split."""


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, batch_size: int, device: str = "cpu") -> Evaluation:
    """Runs a model over a split in evaluation mode and leaves it in that mode."""
    if not len(split):
        return Evaluation(None, None)
    model.eval()
    hits, speeds = 0, []
    for start in range(0, len(split), batch_size):
        indices = torch.arange(start, min(start + batch_size, len(split)))
        images = split.images(indices).to(device)
        begun = time.perf_counter()
        logits = model(images)
        if device != "cpu":
            torch.cuda.synchronize()
        speeds.append(len(indices) / (time.perf_counter() - begun))
        hits += int((logits.argmax(1).cpu() == split.labels[indices]).sum())
    return Evaluation(hits / len(split), sorted(speeds)[len(speeds) // 2])
