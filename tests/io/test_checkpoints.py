"""Models to checkpoints and back."""

import copy
import json

import pytest
import torch
from torch import nn

import thintune as tt
from thintune.errors import CheckpointError
from thintune.io import read_checkpoint
from thintune.nn import CompressedLinear, SubspaceLinear, ThinLinear


class Net(nn.Module):
    """(B, 6, 20) to (B, 4), with a counter and a bias-free layer."""

    def __init__(self, wide=44, classes=4):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(20), nn.Linear(20, wide, bias=i > 0), nn.GELU(), nn.Linear(wide, 20))
            for i in range(2)
        )
        self.head = nn.Linear(20, classes)
        self.register_buffer("calls", torch.tensor(3))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(1))


METHODS = ["dense", "thin", "wsi", "wasi", "asi", "amc"]


def inputs(seed=0):
    return torch.randn(30, 6, 20, generator=torch.Generator().manual_seed(seed))


def trained(method):
    """A converted network after two optimizer steps: updates, bases and moments are no longer what they began as."""
    torch.manual_seed(1)
    model = Net()
    if method != "dense":
        config = tt.ThinConfig(rank=7, activation_rank=5, exclude_modules=["head"])
        if method in ("asi", "amc"):
            config = tt.ThinConfig(exclude_modules=["head"])
        tt.convert_(model, config, method=method, calibration=[inputs()])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tt.ThinStep(model, optimizer, refresh_every=2)
    for _ in range(2):
        model(inputs()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model):
    return model.eval()(inputs(7))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("method", METHODS)
def test_logits_come_back_bit_for_bit(method, device, tmp_path):
    model = trained(method)
    expected = logits(model)
    assert not torch.equal(expected, logits(Net()))
    saved = tt.save_checkpoint(model, tmp_path, {"note": [1, None]})
    with torch.device(device):
        empty = Net()
    empty.train()
    again = tt.load_checkpoint_(empty, tmp_path)
    assert again is empty and again.blocks[0][3].training
    assert torch.equal(logits(again), expected)
    assert read_checkpoint(tmp_path).info == {"note": [1, None]}
    assert saved.size_bytes == saved.stored.path.stat().st_size
    assert not any(tensor.is_meta for tensor in again.state_dict().values())


@pytest.mark.parametrize("method", METHODS)
def test_the_file_holds_what_inference_needs_and_nothing_else(method, tmp_path):
    model = trained(method)
    tensors = tt.save_checkpoint(model, tmp_path).stored.load()
    assert not [name for name in tensors if "update" in name or "basis" in name or "factor" in name]
    if method in ("dense", "asi", "amc"):
        assert tensors.keys() == Net().state_dict().keys()
    else:
        elements = sum(tensors[f"blocks.{i}.{j}.{part}"].numel() for i in (0, 1) for j in (1, 3) for part in PARTS)
        assert elements == 4 * 7 * (20 + 44)
    if method == "thin":
        assert {"blocks.0.1.update", "blocks.0.1.basis"} <= model.state_dict().keys()
    if method in ("wasi", "asi"):
        assert any("factor" in name for name in model.state_dict())


PARTS = ("left", "right")


def test_a_loaded_model_is_saved_to_the_same_bytes(tmp_path):
    first = tt.save_checkpoint(trained("thin"), tmp_path / "one").stored
    second = tt.save_checkpoint(tt.load_checkpoint_(Net(), tmp_path / "one"), tmp_path / "two").stored
    assert first.path.name == second.path.name and first.path.read_bytes() == second.path.read_bytes()


def test_loading_is_possible_into_a_model_that_was_converted_another_way(tmp_path):
    thin, dense = trained("thin"), trained("dense")
    tt.save_checkpoint(thin, tmp_path / "thin")
    tt.save_checkpoint(dense, tmp_path / "dense")
    for method in METHODS:
        assert torch.equal(logits(tt.load_checkpoint_(trained(method), tmp_path / "thin")), logits(thin))
    again = tt.load_checkpoint_(trained("asi"), tmp_path / "dense")
    assert isinstance(again.blocks[0][1], CompressedLinear) and torch.equal(logits(again), logits(dense))


def test_what_was_frozen_stays_frozen(tmp_path):
    tt.save_checkpoint(trained("dense"), tmp_path)
    model = Net()
    model.head.requires_grad_(False)
    tt.load_checkpoint_(model, tmp_path)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["head.weight", "head.bias"]


def test_half_precision_stays_half_precision(tmp_path):
    model = trained("thin").to(torch.bfloat16)
    tt.save_checkpoint(model, tmp_path)
    again = tt.load_checkpoint_(Net(), tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert again.calls.dtype == torch.int64 and again.calls.shape == ()
    x = inputs(7).bfloat16()
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model(x))


def test_a_layer_used_under_two_names_comes_back_under_both(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(20, 20)
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x).relu())

    torch.manual_seed(0)
    model = Twice()
    tt.convert_(model, tt.ThinConfig(rank=6), calibration=[inputs()])
    assert isinstance(model.second, SubspaceLinear) and model.second is model.first
    tt.save_checkpoint(model, tmp_path)
    assert torch.equal(logits(tt.load_checkpoint_(Twice(), tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: Net(wide=45), "blocks.0.1: 44 x 20 in the file, 45 x 20 in the model"),
        (lambda: Net(classes=5), r"head.bias: (4,) in the file, (5,) in the model"),
        (lambda: nn.Sequential(nn.Linear(20, 4)), "blocks.0.1: no linear layer of that name"),
        (lambda: without_bias(), "blocks.1.1: a bias in the file, not so in the model"),
        (lambda: with_more(), "extra.weight: missing in the file, (2, 2) in the model"),
    ],
)
def test_another_architecture_is_refused_and_the_model_is_as_it_was(other, said, tmp_path):
    tt.save_checkpoint(trained("thin"), tmp_path)
    model = other()
    before = copy.deepcopy(model)
    with pytest.raises(CheckpointError, match="made for another architecture") as caught:
        tt.load_checkpoint_(model, tmp_path)
    assert said in str(caught.value)
    unchanged(model, before)


def without_bias():
    model = Net()
    model.blocks[1][1] = nn.Linear(20, 44, bias=False)
    return model


def with_more():
    model = Net()
    model.extra = nn.Linear(2, 2)
    return model


def unchanged(model, before):
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in before.named_modules()]
    state = before.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def change(path, edit):
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda d: d.update(format="other"), "expected format"),
        (lambda d: d.update(version=2), "version 1, got 'thintune-checkpoint' 2"),
        (lambda d: d.pop("thin_layers"), "expected the entry 'thin_layers'"),
        (lambda d: d.pop("info"), "expected the entry 'info'"),
        (lambda d: d["thin_layers"]["blocks.0.1"].pop("rank"), "blocks.0.1: expected in_features"),
        (lambda d: d["thin_layers"]["blocks.0.1"].update(rank=90), "blocks.0.1: expected in_features"),
        (lambda d: d["thin_layers"]["blocks.0.1"].update(rank="7"), "blocks.0.1: expected in_features"),
        (lambda d: d["thin_layers"]["blocks.0.1"].update(bias=True), "blocks.0.1: a bias in the file"),
        (lambda d: d["thin_layers"]["blocks.0.1"].update(rank=6), "blocks.0.1.left: (44, 7) in the file, (44, 6)"),
        (lambda d: d["thin_layers"].pop("blocks.0.1"), "blocks.0.1.left: (44, 7) in the file, missing in the model"),
        (lambda d: d["thin_layers"].update({"blocks.0.0": d["thin_layers"]["blocks.0.1"]}), "blocks.0.0: no linear"),
    ],
)
def test_a_document_that_does_not_fit_its_tensors_is_refused(edit, said, tmp_path):
    tt.save_checkpoint(trained("thin"), tmp_path)
    change(tmp_path / "checkpoint.json", edit)
    model = Net()
    before = copy.deepcopy(model)
    with pytest.raises(CheckpointError) as caught:
        tt.load_checkpoint_(model, tmp_path)
    assert said in str(caught.value)
    unchanged(model, before)


def test_a_damaged_file_leaves_the_model_as_it_was(tmp_path):
    path = tt.save_checkpoint(trained("thin"), tmp_path).stored.path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    model = Net()
    before = copy.deepcopy(model)
    with pytest.raises(CheckpointError, match="wrong checksum"):
        tt.load_checkpoint_(model, tmp_path)
    unchanged(model, before)
    assert not any(isinstance(m, ThinLinear) for m in model.modules())
