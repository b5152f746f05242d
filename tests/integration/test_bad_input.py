"""Bad input gets one clear line and exit code 2, and leaves nothing half-written."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import thintune as tt
from thintune.config import PARTS, RunConfig
from thintune.errors import ConversionError, OutputError
from thintune.io import save_checkpoint


@pytest.fixture
def refused(thintune, tmp_path):
    """Runs `thintune train` with flags that must be refused; returns the line that says why."""

    def run(*words, out=None):
        folder = out or tmp_path / "out"
        code, output, err = thintune("train", *words, "--out", folder)
        lines = [line for line in err.strip().splitlines() if line.startswith("thintune: error: ")]
        assert code == 2 and output == "" and err == lines[0] + "\n"
        left = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        assert left in ([], ["record.json"])
        if left:
            assert json.loads((folder / "record.json").read_text())["status"] == "failed"
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--thin.keptt", "0.4"], "Did you mean '--thin.kept'"),
        (["--method", "thinn"], "Did you mean 'thin'"),
        (["--train.epochs", "many"], "expected int, got 'many'"),
        (["--thin.kept", "1.4"], "thin.kept: expected a number in (0, 1], got 1.4"),
        (["--thin.explained_variance", "0"], "thin.explained_variance: expected a number in (0, 1]"),
        (["--thin.explained_variance", "1.5"], "thin.explained_variance: expected a number in (0, 1]"),
        (
            ["--thin.explained_variance", "0.9", "--thin.kept", "0.5"],
            "expected one of kept, explained_variance and rank",
        ),
        (["--data.name", "digit"], "Did you mean 'digits'"),
        (["--model.name", "timm:vit_tinny_patch16_224"], "Did you mean 'vit_tiny_patch16_224'"),
        (["--model.name", "resnet"], "expected 'timm:NAME'"),
        (["--model.options", '{"depht": 2}'], "depht"),
        (["--model.checkpoint", "/nowhere/model.safetensors"], "found nothing of that name"),
        (["--thin.rank", "900"], "rank 900 exceeds min(in_features=48, out_features=144)"),
        (["--thin.include_modules", "[block]"], "matches no linear layer. Did you mean 'blocks'"),
        (["--data.train_limit", "99999"], "99999"),
        (["--thin.calibration_images", "1", "--thin.rank", "40"], "calibration"),
        (["--method", "galore", "--galore.rank", "64"], "galore.rank: expected less than the smaller side"),
        (["--method", "galore", "--galore.scale", "0"], "galore.scale: expected more than 0, got 0"),
        (["--method", "svd_lora", "--thin.rank", "900"], "rank 900 exceeds min(in_features=48, out_features=144)"),
        (["--galore.rang", "3"], "Did you mean '--galore.rank'"),
        (["--method", "lora_fa", "--lora.rank", "0"], "lora.rank: expected at least 1, got 0"),
        (["--method", "amc", "--thin.activation_explained_variance", "0"], "expected a number in (0, 1], got 0"),
        (["--method", "head", "--model.checkpoint", "models"], "method: expected thin, to start from the checkpoint"),
    ],
)
def test_a_bad_value_is_named(words, said, tiny, refused):
    assert said in refused(*tiny, *words)


@pytest.mark.parametrize(
    ("method", "module", "extra"),
    [
        ("galore", "pytorch_optimizer.optimizer.utils.galore", "bench"),
        ("lora", "peft", "peft"),
        ("lora_fa", "peft", "peft"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(method, module, extra, tiny, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert f"pip install 'thintune[{extra}]'" in refused(*tiny, "--method", method)


def test_a_bad_key_of_a_yaml_file_is_named(tiny, refused, tmp_path):
    (tmp_path / "bad.yaml").write_text("thin: {keptt: 0.4}\n")
    assert "Did you mean 'thin.kept'" in refused("--config", tmp_path / "bad.yaml", *tiny)
    assert "nope.yaml" in refused("--config", tmp_path / "nope.yaml", *tiny)


def test_a_device_that_is_not_there(tiny, refused):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert "--device cpu" in refused(*tiny, "--device", "cuda")


def test_weights_that_are_truncated_or_of_another_architecture(tiny, refused, tmp_path):
    good = "models/vit_demo/model.safetensors"
    assert "made for another architecture" in refused(*tiny, "--model.checkpoint", good)
    cut = tmp_path / "cut.safetensors"
    with open(good, "rb") as stream:
        cut.write_bytes(stream.read(100_000))
    assert "truncated" in refused(*tiny, "--model.checkpoint", cut)


def images(root, classes, count=6):
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 20), (i * 30, 10, 10)).save(root / name / f"{i}.png")


def test_images_that_are_corrupt_or_of_one_class(tiny, refused, tmp_path):
    flags = [*tiny[: tiny.index("--data.name")], "--data.name", "folder", "--data.image_size", "28"]
    images(tmp_path / "one", ["cat"])
    assert "two classes" in refused(*flags, "--data.root", tmp_path / "one")
    images(tmp_path / "two", ["cat", "dog"])
    for path in (tmp_path / "two").glob("*/*.png"):
        path.write_bytes(b"no image")
    assert ".png" in refused(*flags, "--data.root", tmp_path / "two")
    assert "missing" in refused(*flags, "--data.root", tmp_path / "missing")


def test_output_that_cannot_be_written(tiny, thintune, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = thintune("train", *tiny, "--out", tmp_path / "file" / "run")
    assert code == 2 and err.startswith("thintune: error: ") and "expected a folder" in err


def test_a_full_disk_keeps_the_older_checkpoint(tmp_path):
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        small, large = torch.nn.Linear(10, 10), torch.nn.Linear(400, 400)
        save_checkpoint(small, disk / "checkpoint")
        with pytest.raises(OutputError, match="No space left"):
            save_checkpoint(large, disk / "checkpoint")
        loaded = tt.load_checkpoint_(torch.nn.Linear(10, 10), disk / "checkpoint")
        assert torch.equal(loaded.weight, small.weight)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_loss_that_is_not_finite_names_step_and_layer_and_keeps_the_last_state(
    tiny, thintune, record, monkeypatch, tmp_path
):
    from thintune.cli.display import RichDisplay

    original = RichDisplay.step

    def poison(self, progress):
        original(self, progress)
        if progress.step == 3:
            model = next(m for m in MODELS if hasattr(m, "blocks"))
            model.blocks[1].norm1.weight.data.fill_(float("nan"))

    from thintune.train import run

    MODELS = []
    build = run.build

    def remember(*arguments):
        result = build(*arguments)
        MODELS.append(result[0])
        return result

    monkeypatch.setattr(run, "build", remember)
    monkeypatch.setattr(RichDisplay, "step", poison)
    code, _, err = thintune("train", *tiny, "--train.checkpoint_every", "2", "--out", tmp_path)
    assert code == 2 and "step 4: loss is nan, first seen at blocks.1.norm1" in err
    assert record(tmp_path)["status"] == "failed" and "step 4" in record(tmp_path)["error"]
    monkeypatch.setattr(RichDisplay, "step", original)
    assert thintune("train", "--resume", "--out", tmp_path)[0] == 0
    assert record(tmp_path)["status"] == "completed"


@pytest.mark.parametrize("calibration", [None, []])
def test_an_empty_calibration_is_refused_before_anything_changes(calibration):
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    with pytest.raises(ConversionError, match="calibration"):
        tt.convert_(model, tt.ThinConfig(rank=2), calibration=calibration)
    assert type(model[0]) is torch.nn.Linear


def test_eval_refuses_what_is_no_checkpoint(thintune, tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        code, _, err = thintune("eval", path)
        assert code == 2 and err.startswith("thintune: error: ") and err.count("\n") == 1
    code, _, err = thintune("eval", tmp_path, "--threads", "0")
    assert code == 2 and err == "thintune: error: --threads: expected at least 1, got 0.\n"


def test_help_names_every_setting_and_explains_it(thintune):
    code, output, _ = thintune("train", "--help")
    assert code == 0
    text = " ".join(output.split())
    for part, cls in PARTS.items():
        for field in dataclasses.fields(cls):
            flag = f"--{part}.{field.name} "
            assert flag in text
            entries = [found for found in text.split(flag)[1:] if "(type:" in found[:400]]
            assert any(len(found.split("(type:")[0].split()) > 3 for found in entries), flag
    for field in dataclasses.fields(RunConfig):
        assert f"--{field.name}" in text
    assert thintune("--help")[0] == 0 and thintune("eval", "--help")[0] == 0
    assert thintune()[0] == 2 and thintune("trian")[0] == 2
