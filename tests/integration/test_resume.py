"""An interrupted run, taken up again, ends with the bits of one that was never interrupted."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from thintune.cli.display import RichDisplay
from thintune.io import read_checkpoint


def weights(out):
    return read_checkpoint(out / "checkpoint").stored.load()


def same_bits(one, other):
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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
@pytest.mark.parametrize("method", ["thin", "wasi", "asi", "lora", "dense"])
def test_ctrl_c_saves_and_resume_ends_with_the_same_bits(
    method, optimizer, tiny, thintune, record, interrupt, tmp_path
):
    words = [*tiny, "--method", method, "--train.optimizer", optimizer]
    assert thintune("train", *words, "--out", tmp_path / "whole")[0] == 0
    interrupt(4)
    code, _, err = thintune("train", *words, "--out", tmp_path / "cut")
    assert code == 130 and "--resume" in err
    assert record(tmp_path / "cut")["status"] == "interrupted" and record(tmp_path / "cut")["steps"] == 4
    assert not (tmp_path / "cut" / "checkpoint").exists()
    code, _, err = thintune("train", "--resume", "--out", tmp_path / "cut")
    assert code == 0, err
    assert same_bits(tmp_path / "whole", tmp_path / "cut")
    whole, cut = record(tmp_path / "whole"), record(tmp_path / "cut")
    assert cut["resumed"] and cut["steps"] == 10
    assert all(whole[k] == cut[k] for k in ("test_accuracy", "val_accuracy", "train_loss", "kept_weight_fraction"))


def test_a_killed_process_resumes_to_the_same_bits(tiny, tmp_path):
    words = [*tiny, "--train.epochs", "8", "--train.checkpoint_every", "2", "--threads", "1"]
    command = [sys.executable, "-m", "thintune", "train"]
    subprocess.run([*command, *words, "--out", tmp_path / "whole"], check=True, capture_output=True)
    with subprocess.Popen([*command, *words, "--out", tmp_path / "cut"], stderr=subprocess.DEVNULL) as process:
        state = tmp_path / "cut" / "state" / "state.json"
        deadline = time.monotonic() + 120
        while not (state.exists() and json.loads(state.read_text())["step"] >= 6):
            assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
            time.sleep(0.005)
        process.kill()
    assert not (tmp_path / "cut" / "checkpoint").exists()
    subprocess.run([*command, "--resume", "--out", tmp_path / "cut"], check=True, capture_output=True)
    assert same_bits(tmp_path / "whole", tmp_path / "cut")


def test_resume_refuses_other_settings_and_a_damaged_or_missing_state(tiny, thintune, interrupt, tmp_path):
    interrupt(2)
    assert thintune("train", *tiny, "--out", tmp_path)[0] == 130
    code, _, err = thintune("train", "--resume", "--train.batch_size", "30", "--out", tmp_path)
    assert code == 2 and "train.batch_size is 20, not 30" in err
    (tensors,) = (tmp_path / "state").glob("*.safetensors")
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    code, _, err = thintune("train", "--resume", "--out", tmp_path)
    assert code == 2 and "checksum" in err
    code, _, err = thintune("train", "--resume", "--out", tmp_path / "nothing")
    assert code == 2 and "--resume" in err


def test_a_run_is_not_overwritten_unless_asked(tiny, thintune, tmp_path):
    words = [*tiny, "--train.max_steps", "1", "--out", tmp_path]
    assert thintune("train", *words)[0] == 0
    code, _, err = thintune("train", *words)
    assert code == 2 and "--overwrite" in err
    assert thintune("train", *words, "--overwrite")[0] == 0
