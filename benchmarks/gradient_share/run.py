"""How much of a batch's weight gradient a thin layer's step can hold, and which activation basis holds most of it.

DINOv2 ViT-S/14 at 56 pixels on Fashion-MNIST, converted to a share of its weights, with a fitted head. Bases are chosen
on some batches (leading directions of the input's second moment, or of the weight gradients) and judged on others:

- `kept`: share of |D|^2, D = G.T X, left in D U U.T, what the layer's update gradient holds;
- `taken`: share of |D|^2 that the step D U U.T moves the weight by to first order, its part in the tangent space of
  rank-K weights at L R;
- `limit`: the same for the whole of D, which no basis can exceed by much.

Means over the layers of a kind go to benchmarks/results/gradient_share.json.

    python benchmarks/gradient_share/run.py --backbone runs/dinov2_vits14.safetensors
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thintune.config import DataConfig, ModelConfig, RunConfig, ThinConfig, TrainConfig
from thintune.data import Split
from thintune.measure import provenance
from thintune.nn import SubspaceLinear
from thintune.train.head import fit_head_
from thintune.train.models import classifier_name
from thintune.train.prepare import build, load_data

RESULT = Path(__file__).parent.parent / "results" / "gradient_share.json"
BATCH = 128
CHOSEN_ON, JUDGED_ON = (0, 1, 2), (5, 6)
RANKS = (16, 32, 96)


class Watch:
    """Inputs and output gradients of every thin layer, as rows."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, SubspaceLinear)}
        self._inputs: dict[str, Tensor] = {}
        self._grads: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            layer.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._inputs[name] = inputs[0].detach().flatten(0, -2)
            output.register_hook(lambda grad: self._grads.__setitem__(name, grad.flatten(0, -2)))

        return keep

    def batch(self, split: Split, number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weight gradients (O, I) and second moments of the inputs (I, I) of one batch, by layer."""
        rows = torch.arange(number * BATCH, (number + 1) * BATCH)
        self.model.train()
        self.model.zero_grad()
        F.cross_entropy(self.model(split.images(rows)), split.labels[rows]).backward()
        gradients = {name: self._grads[name].T @ self._inputs[name] for name in self.layers}
        return gradients, {name: x.T @ x for name, x in self._inputs.items()}


def leading(gram: Tensor, rank: int) -> Tensor:
    """(I, r) leading eigenvectors."""
    return torch.linalg.eigh(gram.double())[1].flip(1)[:, :rank].float()


def tangent(layer: SubspaceLinear, move: Tensor) -> Tensor:
    """The part of a move (O, I) of the weight in the tangent space of weights of the layer's rank."""
    left = layer.left.detach()
    rows = torch.linalg.qr(layer.right.detach().T)[0]
    inside = left @ (left.T @ move)
    return inside + ((move - inside) @ rows) @ rows.T


def shares(watch: Watch, split: Split) -> dict[str, dict[str, float]]:
    """Means by kind of layer and by what is measured."""
    moments: dict[str, Any] = defaultdict(int)
    grams: dict[str, Any] = defaultdict(int)
    for number in CHOSEN_ON:
        gradients, seconds = watch.batch(split, number)
        for name in watch.layers:
            moments[name] = moments[name] + seconds[name]
            grams[name] = grams[name] + gradients[name].T @ gradients[name]
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    judged = [watch.batch(split, number)[0] for number in JUDGED_ON]
    for name, layer in watch.layers.items():
        kind = found[name.split(".", 2)[2]]
        bases = {"inputs": leading(moments[name], max(RANKS)), "gradients": leading(grams[name], max(RANKS))}
        for gradient in (gradients[name] for gradients in judged):
            whole = float(gradient.square().sum())
            kind["limit"].append(float(tangent(layer, gradient).square().sum()) / whole)
            for rank in RANKS:
                for chosen, basis in bases.items():
                    move = (gradient @ basis[:, :rank]) @ basis[:, :rank].T
                    kind[f"kept, {chosen}, r={rank}"].append(float(move.square().sum()) / whole)
                    kind[f"taken, {chosen}, r={rank}"].append(float(tangent(layer, move).square().sum()) / whole)
    return {kind: {name: round(sum(v) / len(v), 4) for name, v in parts.items()} for kind, parts in found.items()}


def main() -> None:
    """Measures every share of the weights and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, help="safetensors file of the DINOv2 script")
    arguments = parser.parse_args()
    rows: dict[str, Any] = {}
    for kept in (0.4, 0.25, 0.15):
        exact = ThinConfig(kept=kept, attention="exact", activation="exact", norm="exact")
        data = DataConfig(name="fashion-mnist", image_size=56, train_limit=1024)
        train = TrainConfig(batch_size=BATCH)
        config = RunConfig("thin", ModelConfig(checkpoint=arguments.backbone), data, train, exact)
        splits = load_data(config.model, config.data)
        model, _ = build(config, splits)
        head = model.get_submodule(classifier_name(model))
        assert isinstance(head, nn.Linear)
        fit_head_(model, head, splits.train, 32)
        rows[str(kept)] = shares(Watch(model), splits.train)
        print(kept, json.dumps(rows[str(kept)], indent=2))
    document = {
        "command": "python benchmarks/gradient_share/run.py " + " ".join(sys.argv[1:]),
        "date": provenance.date(),
        "git_commit": provenance.git_commit(),
        "seed": 0,
        "threads": torch.get_num_threads(),
        "versions": provenance.versions(),
        "kept": rows,
    }
    RESULT.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
