"""What loading costs a fresh process, by the kernel's own high-water mark."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import thintune as tt
from thintune.errors import CheckpointError
from thintune.io.tensor_file import TensorFile
from thintune.measure import peak_rss_bytes
from thintune.nn import ThinLinear

SLACK_BYTES = 4 << 20  # modules, headers, the reading of the checksum

THIN = """
import json, sys, torch
from torch import nn
import thintune as tt
from thintune.measure import peak_rss_bytes, rss_bytes
torch.set_num_threads(1)
before = rss_bytes()
with torch.device("meta"):
    model = nn.Sequential(*[nn.Linear(1536, 2048) for _ in range(12)])
tt.load_checkpoint_(model, sys.argv[1])
print(json.dumps([peak_rss_bytes() - before, float(model[11].right.detach().double().sum())]))
"""

DENSE = """
import json, sys, torch
import thintune, timm
from thintune.config import ModelConfig
from thintune.measure import peak_rss_bytes, rss_bytes
from thintune.train.models import build_model
torch.set_num_threads(1)
config = ModelConfig(name="timm:vit_base_patch16_224", options={"depth": 4}, checkpoint=sys.argv[1])
before = rss_bytes()
model = build_model(config, 10, 112)
print(json.dumps([peak_rss_bytes() - before, float(model.blocks[3].mlp.fc2.weight.detach().double().sum())]))
"""


def measured(source, path):
    if peak_rss_bytes() is None:
        pytest.skip("this system does not tell the memory of a process")
    done = subprocess.run([sys.executable, "-c", source, path], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_a_thin_checkpoint_is_held_once(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(*[ThinLinear(1536, 2048, 700) for _ in range(12)])
    for parameter in model.parameters():
        parameter.data = torch.rand_like(parameter)
    size = tt.save_checkpoint(model, tmp_path).size_bytes
    assert size > 110e6
    growth, total = measured(THIN, tmp_path)
    assert total == float(model[11].right.detach().double().sum())
    assert size < growth < 1.15 * size + SLACK_BYTES


def test_a_dense_file_is_held_once_though_its_positions_are_resampled(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", depth=4)
    path = tmp_path / "dense.safetensors"
    save_file(model.state_dict(), path)
    growth, total = measured(DENSE, path)
    assert total == float(model.blocks[3].mlp.fc2.weight.detach().double().sum())
    size = path.stat().st_size
    assert 0.9 * size < growth < 1.15 * size + SLACK_BYTES


def header(**entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "header is cut off"),
        (b"\x01\x02", "header is cut off"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "header is cut off"),
        ((3).to_bytes(8, "little") + b"{]}", "no JSON document"),
        ((2).to_bytes(8, "little") + b"[]", "no JSON object"),
        (header(x=[1]), "x: no dtype, shape and data_offsets"),
        (header(x=GOOD | {"dtype": "F31"}) + bytes(8), "not known, F31"),
        (header(x=GOOD | {"shape": [-2]}) + bytes(8), "shape [-2]"),
        (header(x=GOOD | {"shape": [3]}) + bytes(8), "does not fit data_offsets"),
        (header(x=GOOD, y=GOOD) + bytes(8), "y: its values do not follow"),
        (header(x=GOOD) + bytes(7), "describes"),
        (header(x=GOOD) + bytes(9), "describes"),
    ],
)
def test_a_damaged_header_is_named(content, said, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or no safetensors file") as caught:
        TensorFile(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_cut_after_its_header_was_read_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(header(__metadata__={"format": "pt"}, x=GOOD) + bytes(8))
    stored = TensorFile(path)
    assert list(stored) == ["x"] and torch.equal(stored.read("x"), torch.zeros(2))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="x: could not be read: the file ends early"):
        stored.read("x")
    path.unlink()
    with pytest.raises(CheckpointError, match="x: could not be read: No such file"):
        stored.read("x")


def test_shapes_are_compared_before_any_tensor_is_read(tmp_path, monkeypatch):
    tt.save_checkpoint(nn.Sequential(nn.Linear(3, 4)), tmp_path)
    monkeypatch.setattr(TensorFile, "read", lambda *_: pytest.fail("read a tensor"))
    with pytest.raises(CheckpointError, match="made for another architecture"):
        tt.load_checkpoint_(nn.Sequential(nn.Linear(3, 5)), tmp_path)


def test_modules_left_alone_need_not_be_those_of_the_file(tmp_path):
    tt.save_checkpoint(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), tmp_path)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 7))
    own = model[1].weight
    tt.load_checkpoint_(model, tmp_path, leave=["1"])
    assert model[1].weight is own
