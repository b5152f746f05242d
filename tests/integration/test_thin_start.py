"""Runs that start from a thin checkpoint."""

import json
import shutil

import pytest
import torch

from thintune.io import read_checkpoint, save_checkpoint
from thintune.train.models import build_model

THREE_STEPS = ["--train.max_steps", "3", "--thin.kept", "0.5"]


@pytest.fixture
def shipped(tiny, thintune, tmp_path):
    """Flags of a run, and the folder of one that left a thin checkpoint."""
    out = tmp_path / "first"
    code, _, err = thintune("train", *tiny, *THREE_STEPS, "--out", out)
    assert code == 0, err
    return tiny, out


def start(tiny, folder, out, *words):
    return ["train", *tiny, "--model.checkpoint", folder, "--train.max_steps", "4", *words, "--out", out]


def tensors(out):
    return read_checkpoint(out / "checkpoint").stored.load()


def test_a_run_starts_from_the_factors_of_another(shipped, thintune, record, tmp_path):
    tiny, first = shipped
    second = tmp_path / "second"
    words = ["--train.learning_rate", "1e-12", "--train.weight_decay", "0", "--train.fit_head", "false"]
    code, _, err = thintune(*start(tiny, first / "checkpoint", second, *words))
    assert code == 0, err
    before, after = tensors(first), tensors(second)
    assert before.keys() == after.keys()
    assert all((before[name] - after[name]).abs().max() < 1e-5 for name in before)
    found = record(second)
    assert found["kept_weight_fraction"] == record(first)["kept_weight_fraction"]
    assert found["test_accuracy"] == record(first)["test_accuracy"]
    assert found["model_checkpoint"] == str(first / "checkpoint") and found["status"] == "completed"
    assert found["saved_activation_bytes"] == record(first)["saved_activation_bytes"]
    code, output, _ = thintune("eval", second, "--json")
    assert code == 0 and json.loads(output)["accuracy"] == found["test_accuracy"]


def test_a_run_folder_will_do_and_a_resumed_run_ends_with_the_same_bits(shipped, thintune, tmp_path):
    tiny, first = shipped
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert thintune(*start(tiny, first, whole))[0] == 0
    words = start(tiny, first, parts, "--train.checkpoint_every", "2")
    from thintune.train.loop import Loop

    step = Loop._timed_step

    def interrupted(self, indices):
        if self.progress.step == 3:
            raise KeyboardInterrupt
        step(self, indices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_timed_step", interrupted)
        assert thintune(*words)[0] == 130
    shutil.rmtree(first)  # a resumed run needs nothing but its state
    assert thintune("train", "--resume", "--out", parts)[0] == 0
    one, two = tensors(whole), tensors(parts)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_another_number_of_classes_gets_a_fresh_head(shipped, thintune, tmp_path):
    tiny, first = shipped
    words = ["--data.name", "synthetic", "--data.synthetic_classes", "3", "--data.train_limit", "60"]
    words += ["--data.test_limit", "20"]
    code, _, err = thintune(*start(tiny, first, tmp_path / "other", *words))
    assert code == 0, err
    assert tensors(tmp_path / "other")["head.weight"].shape == (3, 48)
    assert tensors(first)["head.weight"].shape == (10, 48)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "dense"], "method: expected thin, to start from the checkpoint folder"),
        (["--method", "wasi"], "got 'wasi', which starts from a safetensors file"),
        (["--thin.kept", "0.3"], "thin.kept: decided by the thin checkpoint"),
        (["--thin.exclude_modules", "[blocks.0]"], "thin.exclude_modules: decided by"),
        (["--data.image_size", "56"], "made for another architecture, with data.image_size 28, not 56"),
        (["--model.name", "timm:deit_tiny_patch16_224"], "with model.name timm:vit_tiny_patch16_224, not"),
        (
            ["--model.options", '{"patch_size": 7, "depth": 3, "embed_dim": 48, "num_heads": 3}'],
            "made for another architecture: blocks.2.",
        ),
    ],
)
def test_what_does_not_go_with_a_thin_checkpoint_is_one_line(words, said, shipped, thintune, tmp_path):
    tiny, first = shipped
    code, output, err = thintune(*start(tiny, first, tmp_path / "out", *words))
    assert code == 2 and output == "" and err.startswith("thintune: error: ") and err.count("\n") == 1
    assert said in err


def test_folders_that_hold_no_thin_checkpoint_are_named(shipped, thintune, tmp_path):
    tiny, first = shipped
    (tmp_path / "empty").mkdir()
    code, _, err = thintune(*start(tiny, tmp_path / "empty", tmp_path / "out"))
    assert code == 2 and "checkpoint.json: could not be read" in err and err.count("\n") == 1
    from thintune.config import ModelConfig

    options = {"patch_size": 7, "depth": 2, "embed_dim": 48, "num_heads": 3}
    dense = build_model(ModelConfig(name="timm:vit_tiny_patch16_224", options=options), 10, 28)
    saved = save_checkpoint(dense, tmp_path / "dense")
    code, _, err = thintune(*start(tiny, tmp_path / "dense", tmp_path / "out"))
    assert code == 2 and f"found none; to convert its dense weights, pass {saved.stored.path}" in err
    path = next((first / "checkpoint").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    code, _, err = thintune(*start(tiny, first, tmp_path / "out"))
    assert code == 2 and "truncated" in err and err.count("\n") == 1
