"""An interrupted run, taken up again, ends with the bits of one that was never interrupted."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from thintune.cli.display import RichDisplay
from thintune.config import TrainConfig
from thintune.io import read_checkpoint, read_tensors


def weights(out):
    return read_checkpoint(out / "checkpoint").stored.load()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_bits(one, other):
    return same(weights(one), weights(other))


def same_states(one, other):
    """Weights, bases, moments and random state at the last step."""
    a, b = (read_tensors(out / "state", "state") for out in (one, other))
    found = a.load()
    assert {name.split(".")[0] for name in found} == {"model", "optimizer", "random"}
    return a.document["step"] == b.document["step"] and same(found, b.load())


@pytest.fixture
def interrupt(monkeypatch):
    """Makes the run receive SIGINT right after a given step."""

    def at(step):
        original = RichDisplay.step

        def signalled(self, progress):
            original(self, progress)
            if progress.step == step:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(RichDisplay, "step", signalled)

    return at


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(
    "method", ["thin", "wasi", "asi", "amc", "lora", "lora_fa", "svd_lora", "galore", "head", "dense"]
)
def test_ctrl_c_saves_and_resume_ends_with_the_same_bits(
    method, optimizer, tiny, thintune, record, interrupt, tmp_path
):
    words = [*tiny, "--method", method, "--train.optimizer", optimizer, "--train.checkpoint_every", "10"]
    assert thintune("train", *words, "--out", tmp_path / "whole")[0] == 0
    interrupt(7)  # inside the second epoch, between two refreshes of the bases
    code, _, err = thintune("train", *words, "--out", tmp_path / "cut")
    assert code == 130 and "--resume" in err
    assert record(tmp_path / "cut")["status"] == "interrupted" and record(tmp_path / "cut")["steps"] == 7
    assert not (tmp_path / "cut" / "checkpoint").exists()
    code, _, err = thintune("train", "--resume", "--out", tmp_path / "cut")
    assert code == 0, err
    assert same_bits(tmp_path / "whole", tmp_path / "cut") and same_states(tmp_path / "whole", tmp_path / "cut")
    whole, cut = record(tmp_path / "whole"), record(tmp_path / "cut")
    assert cut["resumed"] and cut["steps"] == 10
    assert all(whole[k] == cut[k] for k in ("test_accuracy", "val_accuracy", "train_loss", "kept_weight_fraction"))


@pytest.mark.parametrize("method", ["thin", "amc", "lora", "svd_lora"])
def test_a_model_with_buffers_that_no_file_holds_resumes_to_the_same_bits(method, tiny, thintune, interrupt, tmp_path):
    swin = ["--model.name", "timm:swin_tiny_patch4_window7_224", "--data.image_size", "32", "--train.epochs", "1"]
    options = '{"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "drop_path_rate": 0.2}'
    words = [*tiny, *swin, "--model.options", options, "--method", method]
    assert thintune("train", *words, "--out", tmp_path / "whole")[0] == 0
    interrupt(3)
    assert thintune("train", *words, "--out", tmp_path / "cut")[0] == 130
    code, _, err = thintune("train", "--resume", "--out", tmp_path / "cut")
    assert code == 0, err
    assert same_bits(tmp_path / "whole", tmp_path / "cut")


def wait_for_step(process, out, step):
    state = out / "state" / "state.json"
    deadline = time.monotonic() + 120
    while not (state.exists() and json.loads(state.read_text())["step"] >= step):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be stopped"
        time.sleep(0.005)


def test_a_process_stopped_and_then_killed_resumes_to_the_same_bits(tiny, record, tmp_path):
    words = [*tiny, "--train.epochs", "12", "--train.checkpoint_every", "2", "--threads", "1"]
    command = [sys.executable, "-m", "thintune", "train"]
    subprocess.run([*command, *words, "--out", tmp_path / "whole"], check=True, capture_output=True)
    with subprocess.Popen([*command, *words, "--out", tmp_path / "cut"], stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(process, tmp_path / "cut", 4)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130 and "--resume" in said and "Traceback" not in said
    stopped = record(tmp_path / "cut")
    assert stopped["status"] == "interrupted" and 4 <= stopped["steps"] < 50
    resume = [*command, "--resume", "--out", tmp_path / "cut"]
    with subprocess.Popen(resume, stderr=subprocess.DEVNULL) as process:
        wait_for_step(process, tmp_path / "cut", stopped["steps"] + random.randrange(1, 9))
        time.sleep(random.random() / 50)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "cut" / "checkpoint").exists()
    subprocess.run(resume, check=True, capture_output=True)
    assert same_bits(tmp_path / "whole", tmp_path / "cut") and same_states(tmp_path / "whole", tmp_path / "cut")


def test_resume_refuses_other_settings_and_a_damaged_or_missing_state(tiny, thintune, interrupt, tmp_path):
    interrupt(2)
    assert thintune("train", *tiny, "--out", tmp_path)[0] == 130
    code, _, err = thintune("train", "--resume", "--train.batch_size", "30", "--out", tmp_path)
    assert code == 2 and "train.batch_size is 20, not 30" in err
    code, _, err = thintune("train", "--resume", "--train.epochs", TrainConfig().epochs, "--out", tmp_path)
    assert code == 2 and "train.epochs is 2, not 3" in err  # a default that is asked for counts as well
    (tensors,) = (tmp_path / "state").glob("*.safetensors")
    data = tensors.read_bytes()
    for broken, said in ((data[:-1] + bytes([data[-1] ^ 1]), "checksum"), (data[:-1], "truncated")):
        tensors.write_bytes(broken)
        code, _, err = thintune("train", "--resume", "--out", tmp_path)
        assert code == 2 and said in err and err.count("\n") == 1
    tensors.write_bytes(data)
    (tmp_path / "state" / "state.json").write_text("{}")
    assert thintune("train", "--resume", "--out", tmp_path)[0] == 2
    code, _, err = thintune("train", "--resume", "--out", tmp_path / "nothing")
    assert code == 2 and "--resume" in err and not (tmp_path / "nothing").exists()


def test_resume_takes_flags_that_repeat_the_settings(tiny, thintune, interrupt, tmp_path):
    interrupt(9)
    assert thintune("train", *tiny, "--out", tmp_path)[0] == 130
    assert thintune("train", *tiny, "--resume", "--out", tmp_path)[0] == 0


def test_an_overwritten_run_is_not_taken_up(tiny, thintune, tmp_path):
    words = [*tiny, "--train.max_steps", "1", "--out", tmp_path]
    assert thintune("train", *words)[0] == 0
    assert thintune("train", *words, "--overwrite", "--train.checkpoint_every", "0", "--train.seed", "5")[0] == 0
    code, _, err = thintune("train", "--resume", "--out", tmp_path)
    assert code == 2 and "nothing there" in err


def test_a_run_is_not_overwritten_unless_asked(tiny, thintune, tmp_path):
    words = [*tiny, "--train.max_steps", "1", "--out", tmp_path]
    assert thintune("train", *words)[0] == 0
    code, _, err = thintune("train", *words)
    assert code == 2 and "--overwrite" in err
    assert thintune("train", *words, "--overwrite")[0] == 0
