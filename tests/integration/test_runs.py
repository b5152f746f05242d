"""Runs as a user starts them: records, evaluation, determinism, micro-batches."""

import dataclasses
import json

import pytest
import torch

from thintune.io import read_checkpoint
from thintune.records import RunRecord

METHODS = ["thin", "wasi", "wsi", "asi", "amc", "lora", "lora_fa", "svd_lora", "galore", "head", "dense"]
MAY_BE_NULL = {"error", "explained_variance", "model_checkpoint", "git_commit"}


def weights(out):
    return read_checkpoint(out / "checkpoint").stored.load()


def merged(tensors):
    """Weights as products: the factors of one weight are free to turn against each other."""
    products = {n: tensors[n] @ tensors[n.replace("left", "right")] for n in tensors if n.endswith("left")}
    return products | {n: t for n, t in tensors.items() if not n.endswith(("left", "right"))}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_a_full_record_and_eval_reproduces_its_accuracy(
    method, tiny, pretrained, thintune, record, tmp_path
):
    out = tmp_path / "run"
    code, _, err = thintune("train", *tiny, *pretrained, "--method", method, "--out", out)
    assert code == 0, err
    found = record(out)
    assert set(found) == {f.name for f in dataclasses.fields(RunRecord)}
    assert found["status"] == "completed" and found["steps"] == 10 and found["train_images"] == 300
    assert [k for k, v in found.items() if v is None and k not in MAY_BE_NULL] == []
    assert found["peak_rss_bytes"] >= found["baseline_rss_bytes"] > 0
    assert found["test_accuracy"] > 0.75  # a fitted head and ten steps; chance is 0.1
    assert (0 < found["kept_weight_fraction"] < 1) == (method in ("thin", "wasi", "wsi", "svd_lora"))
    code, output, err = thintune("eval", out, "--json")
    assert code == 0, err
    assert json.loads(output)["accuracy"] == found["test_accuracy"]


def test_thin_saves_fewer_bytes_takes_fewer_flops_and_ships_a_smaller_file_than_dense(tiny, thintune, record, tmp_path):
    for method in ("thin", "dense"):
        assert thintune("train", *tiny, "--method", method, "--thin.kept", "0.4", "--out", tmp_path / method)[0] == 0
    thin, dense = record(tmp_path / "thin"), record(tmp_path / "dense")
    for key in ("saved_activation_bytes", "train_flops_per_step", "checkpoint_bytes", "parameter_bytes"):
        assert thin[key] < 0.8 * dense[key], key
    assert not any(name.endswith(("update", "basis")) for name in weights(tmp_path / "thin"))


@pytest.mark.parametrize("method", ["thin", "dense"])
def test_a_seed_decides_every_bit(method, tiny, thintune, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        words = ["--method", method, "--train.seed", seed, "--out", tmp_path / name]
        assert thintune("train", *tiny, *words)[0] == 0
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a if c[name].shape == a[name].shape)


@pytest.mark.parametrize("method", ["thin", "wsi", "svd_lora", "head", "dense"])
def test_micro_batches_give_the_weights_of_the_whole_batch(method, tiny, thintune, tmp_path):
    tiny[tiny.index("--model.options") + 1] = '{"patch_size": 7, "depth": 2, "embed_dim": 48, "num_heads": 3}'
    for name, extra in (("whole", []), ("parts", ["--train.micro_batch", "7"])):
        words = ["--method", method, "--train.optimizer", "sgd", "--train.label_smoothing", "0.1", *extra]
        words += ["--train.fit_head", "false"]
        assert thintune("train", *tiny, *words, "--out", tmp_path / name)[0] == 0
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name, tensor in merged(whole).items():
        assert (tensor - merged(parts)[name]).abs().max() < 1e-4 * max(1.0, float(tensor.abs().max())), name


def test_max_steps_ends_the_run_and_a_head_need_not_be_fitted(tiny, thintune, record, tmp_path):
    words = ["--train.max_steps", "3", "--train.fit_head", "false", "--train.checkpoint_every", "0"]
    assert thintune("train", *tiny, *words, "--out", tmp_path)[0] == 0
    found = record(tmp_path)
    assert found["steps"] == 3 and found["head_val_accuracy"] is None
    assert not (tmp_path / "state").exists()


def test_a_yaml_file_gives_the_flags(tiny, thintune, record, tmp_path):
    (tmp_path / "run.yaml").write_text("method: wasi\nthin: {explained_variance: 0.7}\ntrain: {max_steps: 1}\n")
    assert thintune("train", "--config", tmp_path / "run.yaml", *tiny, "--out", tmp_path / "run")[0] == 0
    found = record(tmp_path / "run")
    assert found["method"] == "wasi" and found["explained_variance"] == 0.7 and found["steps"] == 1


def test_an_activation_budget_bounds_what_the_converted_layers_keep(tiny, thintune, record, tmp_path):
    words = ["--method", "asi", "--train.max_steps", "1"]
    free = ["--thin.activation_explained_variance", "1.0"]
    assert thintune("train", *tiny, *words, *free, "--out", tmp_path / "free")[0] == 0
    words += ["--thin.activation_budget_bytes", "60000"]
    assert thintune("train", *tiny, *words, "--out", tmp_path / "bound")[0] == 0
    assert record(tmp_path / "bound")["saved_activation_bytes"] < record(tmp_path / "free")["saved_activation_bytes"]
