"""The package as a user meets it."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thintune as tt

HEAVY = ["timm", "torchvision", "peft", "sklearn", "PIL", "matplotlib", "jsonargparse", "rich", "transformers"]


def test_importing_loads_torch_and_nothing_heavier():
    source = "import sys, thintune; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"torch", "thintune.convert", "thintune.optim"} <= loaded
    assert sorted(loaded & set(HEAVY)) == []
    assert done.stderr == ""


def test_the_heavy_modules_are_named_as_python_names_them():
    from importlib.util import find_spec

    assert [name for name in ("jsonargparse", "rich") if find_spec(name) is None] == []


def test_the_public_names_are_there():
    names = ["ThinConfig", "ThinStep", "convert_", "load_checkpoint_", "measure", "merge_", "save_checkpoint"]
    assert set(names) <= set(tt.__all__)
    assert all(hasattr(tt, name) for name in tt.__all__)
    assert callable(tt.measure.track)
    assert tt.__version__ == version("thintune")


class Mixer(nn.Module):
    """A small network over (B, 6, 20)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(20), nn.Linear(20, 60), nn.GELU(), nn.Linear(60, 20)) for _ in range(3)
        )
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(1))


def task(count: int) -> tuple[Tensor, Tensor]:
    """Four classes, told apart by a direction each."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 4
    directions = torch.randn(4, 20, generator=generator)
    return torch.randn(count, 6, 20, generator=generator) + 0.5 * directions[labels, None], labels


def test_converting_and_training_lowers_the_loss_with_less_memory(tmp_path):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, labels = task(64)
    model = Mixer()
    with tt.measure.track(model) as dense:
        F.cross_entropy(model(x), labels).backward()
    model.zero_grad(set_to_none=True)

    batches = [x[:32], x[32:]]
    config = tt.ThinConfig(kept=0.4, activation_rank=8, exclude_modules=["head"])
    report = tt.convert_(model, config, calibration=batches)
    assert 0.36 <= report.kept_weight_fraction <= 0.4
    assert len(report.converted) == 6

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    tt.ThinStep(model, optimizer, refresh_every=5)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    losses = []
    for _ in range(20):
        with tt.measure.track(model) as thin:
            loss = F.cross_entropy(model(x), labels)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert 1.2 < losses[0] < 1.8
    assert 0.35 < losses[-1] < 0.5
    assert not torch.equal(before["blocks.0.1.left"], model.blocks[0][1].left)
    assert thin.saved_activation_bytes < dense.saved_activation_bytes

    tt.save_checkpoint(model, tmp_path / "thin")
    again = tt.load_checkpoint_(Mixer(), tmp_path / "thin")
    with torch.no_grad():
        expected = model.eval()(x)
        assert torch.equal(again.eval()(x), expected)
        assert (tt.merge_(again)(x) - expected).abs().max() < 1e-4
