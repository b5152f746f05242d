"""Each mistake is one line on standard error and exit code 2."""

import errno
import json

import pytest
import torch

from thintune.cli import main as entry


@pytest.fixture
def mistake(thintune):
    """Runs the command line, which must refuse; returns the only line it says."""

    def run(*words):
        code, output, err = thintune(*words)
        assert code == 2 and output == ""
        (line,) = err.splitlines()
        assert line.startswith("thintune: error: ") and "Traceback" not in line
        return line.removeprefix("thintune: error: ")

    return run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "Did you mean 'train'"),
        (["--verson"], "unknown command"),
        (["train"], "missing: --out"),
        (["train", "--out"], "--out"),
        (["train", "--out", ""], "--out: expected a folder"),
        (["train", "stray", "--out", "OUT"], "stray: unknown flag"),
        (["train", "--train.epoch", "3", "--out", "OUT"], "--train.epoch: unknown flag. Did you mean '--train.epochs'"),
        (["train", "--thin.include_modules", "blocks", "--out", "OUT"], "expected a list, as [blocks, head]"),
        (["train", "--train.optimizer", "adam", "--out", "OUT"], "Did you mean 'adamw'"),
        (["train", "--model.options", "[1]", "--out", "OUT"], "--model.options: expected dict"),
        (["train", "--train", '{"epoch": 1}', "--out", "OUT"], "Did you mean 'train.epochs'"),
        (["train", "--device", "tpu", "--out", "OUT"], "device: expected cpu or cuda"),
        (["eval"], "missing: checkpoint"),
        (["eval", "OUT", "--jsn"], "--jsn: unknown flag. Did you mean '--json'"),
        (["eval", "OUT", "--data.test_limit", "few"], "expected int, got 'few'"),
        (["eval", "OUT"], "nothing there"),
    ],
)
def test_words(words, said, tiny, mistake, tmp_path):
    out = tmp_path / "out"
    if words[-1] == "OUT" and words[0] == "train":
        words = ["train", *tiny, *words[1:]]  # should it be taken, the run is short
    assert said in mistake(*[str(out) if word == "OUT" else word for word in words])
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"trian: {epochs: 1}\n", "Did you mean 'train.epochs'"),
        (b"train: {epoch: 1}\n", "Did you mean 'train.epochs'"),
        (b"train: {epochs: many}\n", "--train.epochs: expected int, got 'many'"),
        (b"train: {epochs: 0}\n", "train.epochs: expected at least 1, got 0"),
        (b"train: {epochs: \n", "parsing"),
        (b"- 1\n- 2\n", "config"),
        (b"\xff\xfe\x00", "no text"),
    ],
)
def test_yaml_files(content, said, tiny, mistake, tmp_path):
    (tmp_path / "run.yaml").write_bytes(content)
    assert said in mistake("train", *tiny, "--config", tmp_path / "run.yaml", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_memory_that_runs_out_is_one_line_and_a_record(tiny, thintune, record, monkeypatch, tmp_path):
    from thintune.train import run

    monkeypatch.setattr(run, "build", lambda *_: torch.empty(1 << 60, dtype=torch.uint8))
    code, _, err = thintune("train", *tiny, "--out", tmp_path)
    assert code == 2 and err == "thintune: error: out of memory; lower train.micro_batch or thin.kept.\n"
    assert record(tmp_path)["status"] == "failed" and record(tmp_path)["error"].startswith("RuntimeError: ")

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(run, "build", full)
    assert "out of memory" in thintune("train", *tiny, "--out", tmp_path)[2]


def test_an_unforeseen_error_is_not_hidden_but_recorded(tiny, thintune, record, monkeypatch, tmp_path):
    from thintune.train import run

    def broken(*_):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(run, "build", broken)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        entry(["train", *tiny, "--out", str(tmp_path)])
    assert record(tmp_path)["error"] == "RuntimeError: a mistake of ours"


def test_an_interrupt_before_the_first_step_does_not_promise_a_state(tiny, thintune, record, monkeypatch, tmp_path):
    from thintune.train import run

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "build", interrupted)
    code, _, err = thintune("train", *tiny, "--out", tmp_path)
    assert code == 130 and "no state was saved" in err and "--resume" not in err
    assert record(tmp_path)["status"] == "interrupted" and record(tmp_path)["test_accuracy"] is None
    monkeypatch.setattr(run, "load_data", interrupted)
    assert thintune("train", *tiny, "--out", tmp_path)[::2] == (130, "thintune: interrupted\n")


def test_a_disk_that_fills_up_during_the_steps_keeps_the_last_state(tiny, thintune, record, monkeypatch, tmp_path):
    from thintune.io import files, tensors

    stream, calls = tensors._stream, []

    def fills_up(path, *arguments):
        calls.append(path)
        if len(calls) == 3:  # the states of steps 0 and 2 fit
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return stream(path, *arguments)

    monkeypatch.setattr(tensors, "_stream", fills_up)
    code, _, err = thintune("train", *tiny, "--train.checkpoint_every", "2", "--out", tmp_path)
    assert code == 2 and "No space left on device" in err.splitlines()[-1]
    assert sum(line.startswith("thintune: error: ") for line in err.splitlines()) == 1
    assert record(tmp_path)["status"] == "failed" and record(tmp_path)["steps"] == 4
    assert files.read_document(tmp_path / "state" / "state.json")["step"] == 2
    assert len(list((tmp_path / "state").iterdir())) == 2 and not (tmp_path / "checkpoint").exists()
    monkeypatch.undo()
    assert thintune("train", "--resume", "--out", tmp_path)[0] == 0


def test_eval_names_what_is_wrong_with_a_checkpoint(tiny, thintune, mistake, tmp_path):
    assert thintune("train", *tiny, "--train.max_steps", "1", "--out", tmp_path)[0] == 0
    folder = tmp_path / "checkpoint"
    document = json.loads((folder / "checkpoint.json").read_text())
    path = folder / document["tensors"]["file"]
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "wrong checksum" in mistake("eval", tmp_path)
    path.write_bytes(data[:1000])
    assert "truncated" in mistake("eval", folder)
    path.unlink()
    assert "missing" in mistake("eval", folder)
    path.write_bytes(data)
    assert thintune("eval", folder)[0] == 0
    if not torch.cuda.is_available():
        assert "--device cpu" in mistake("eval", folder, "--device", "cuda")
    other = {**document, "info": json.loads(json.dumps(document["info"]))}
    other["info"]["config"]["model"]["options"]["depth"] = 3
    (folder / "checkpoint.json").write_text(json.dumps(other))
    assert "made for another architecture: blocks.2." in mistake("eval", folder)
    (folder / "checkpoint.json").write_text(json.dumps({**document, "info": {}}))
    assert "was not written by a training run" in mistake("eval", folder)
