"""What a run notes about the subspaces of its layers."""

import json

import pytest
import torch

TRACKED = ["--train.track_subspaces", "true", "--thin.kept", "0.5", "--train.evaluate_test", "false"]


def subspaces(out):
    return json.loads((out / "subspaces.json").read_text())


@pytest.mark.parametrize(
    ("method", "bases"),
    [
        ("thin", {"weight", "input"}),
        ("wsi", {"weight"}),
        ("wasi", {"weight", "input", "mode 1"}),
        ("asi", {"input", "mode 1"}),
    ],
)
def test_every_layer_is_followed_from_epoch_to_epoch(method, bases, tiny, thintune, record, tmp_path):
    words = list(TRACKED)
    if method != "thin":
        words[words.index("--thin.kept")] = "--thin.explained_variance"
    code, _, err = thintune("train", *tiny, "--method", method, *words, "--out", tmp_path)
    assert code == 0, err
    document = subspaces(tmp_path)
    assert document["epochs"] == [0, 1, 2] and len(document["layers"]) == 8
    for layer in document["layers"].values():
        assert set(layer) == bases
        for name, basis in layer.items():
            assert basis["mean_angle_from_start_deg"][0] == basis["largest_angle_from_last_deg"][0] == 0
            means, largest = basis["mean_angle_from_start_deg"], basis["largest_angle_from_start_deg"]
            assert all(0 <= mean <= most <= 90.0001 for mean, most in zip(means, largest, strict=True))
            assert name != "weight" or means[1] > 0
            assert basis["mean_angle_from_last_deg"][1] == means[1]  # the epoch before the first is the start
    if method == "thin":
        for layer in document["layers"].values():
            assert all(
                sorted(ranks) == ranks and ranks[-1] <= layer["weight"]["rank"]
                for ranks in layer["weight"]["explained_ranks"]
            )
    found = record(tmp_path)
    assert found["test_accuracy"] is None and found["inference_images_per_s"] is None and found["status"] == "completed"
    code, output, _ = thintune("eval", tmp_path, "--json")
    assert code == 0 and 0 <= json.loads(output)["accuracy"] <= 1


def test_tracking_changes_no_bit_and_a_resumed_run_notes_the_same(tiny, thintune, tmp_path, monkeypatch):
    from thintune.io import read_checkpoint
    from thintune.train.loop import Loop

    words = ["train", *tiny, *TRACKED, "--train.checkpoint_every", "2"]
    plain, whole, cut = tmp_path / "plain", tmp_path / "whole", tmp_path / "cut"
    assert thintune(*[w if w != "true" else "false" for w in words], "--out", plain)[0] == 0
    assert thintune(*words, "--out", whole)[0] == 0
    step = Loop._timed_step

    def interrupted(self, indices):
        if self.progress.step == 7:
            raise KeyboardInterrupt
        step(self, indices)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_timed_step", interrupted)
        assert thintune(*words, "--out", cut)[0] == 130
    assert thintune("train", "--resume", "--out", cut)[0] == 0
    assert subspaces(cut) == subspaces(whole)
    one, other = (read_checkpoint(out / "checkpoint").stored.load() for out in (plain, whole))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
