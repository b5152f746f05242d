"""The peers do what their names say: same step as a plain loop, with less held."""

import pytest
import torch
import torch.nn.functional as F

from thintune.bench.cost.ours import data_config
from thintune.bench.cost.peers import LEARNING_RATE, MOMENTUM, Peer, fill_head_
from thintune.bench.cost.rows import all_rows
from thintune.bench.cost.settings import CostSettings
from thintune.config import ModelConfig
from thintune.io import write_tensors
from thintune.train.models import build_model
from thintune.train.prepare import load_data

BATCH = 8
ROWS = {row.name: row for row in all_rows(BATCH)}
OPTIONS = {"patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Settings, a dense file, and the synthetic images."""
    model = ModelConfig("timm:vit_tiny_patch16_224", options=OPTIONS)
    settings = CostSettings(model=model, image_size=16, classes=3, batch_size=BATCH)
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("dense")
    write_tensors(folder, "dense", build_model(model, 3, 16).state_dict(), {})
    (path,) = folder.glob("*.safetensors")
    config = ModelConfig(model.name, str(path), options=OPTIONS)
    return settings, config, load_data(model, data_config(settings))


def stepped(bench, name, steps=2):
    """The weights after some steps of a row."""
    settings, config, splits = bench
    peer = Peer(ROWS[name], config, splits, settings.image_size)
    for _ in range(steps):
        peer.step(torch.arange(BATCH))
    return {n: p.detach() for n, p in peer.model.named_parameters()}, peer


def reference(bench, pieces, steps=2):
    """The plain loop; a step for each of the pieces."""
    settings, config, splits = bench
    model = build_model(config, splits.classes, settings.image_size)
    fill_head_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    for _ in range(steps):
        for rows in torch.arange(BATCH).split(BATCH // pieces):
            F.cross_entropy(model(splits.train.images(rows)), splits.train.labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        *((f"dense-{piece}{way}", 1) for piece in ("full", "mb4") for way in ("", "-ckpt")),
        ("dense-full-in-backward", 1),
        ("dense-mb4-in-momentum", 1),
        ("dense-mb1-in-momentum-ckpt", 1),
        ("dense-mb4-in-backward", 2),
        ("dense-mb4-in-backward-ckpt", 2),
    ],
)
def test_dense_peers_take_the_plain_loops_step(bench, name, pieces):
    found, _ = stepped(bench, name)
    for key, value in reference(bench, pieces).items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_gradients_are_gone_where_the_optimizer_steps_in_backward(bench):
    _, peer = stepped(bench, "dense-mb4-in-backward")
    assert all(p.grad is None for p in peer.model.parameters())


def test_lora_trains_adapters_and_head_alone_whether_the_weights_are_read_or_mapped(bench):
    found, peer = stepped(bench, "lora-mb1-ckpt")
    trained = {n for n, p in peer.model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or n.startswith("head.") for n in trained) and len(trained) == 2 * 4 * 2 + 2
    plain = reference(bench, 1, steps=0)
    frozen = {n.replace(".base_layer", ""): v for n, v in found.items() if n not in trained}
    assert frozen.keys() == plain.keys() - {"head.weight", "head.bias"}
    assert all(torch.equal(v, plain[n]) for n, v in frozen.items())
    mapped, _ = stepped(bench, "lora-mb1-ckpt-mapped")
    assert all(torch.equal(mapped[n], v) for n, v in found.items() if n not in trained)


def test_galore_adds_up_what_it_projects(bench):
    pytest.importorskip("pytorch_optimizer")
    whole, _ = stepped(bench, "galore-mb4", steps=1)
    projected, peer = stepped(bench, "galore-mb4-in-backward", steps=1)
    plain = reference(bench, 1, steps=0)
    weight = "blocks.0.mlp.fc1.weight"
    for found in (whole, projected):
        assert torch.linalg.matrix_rank(found[weight] - plain[weight], rtol=1e-3) <= 16
        assert not torch.equal(found[weight], plain[weight])
    torch.testing.assert_close(whole["head.weight"], projected["head.weight"], rtol=0, atol=1e-6)
    assert all(p.grad is None for p in peer.model.parameters())
